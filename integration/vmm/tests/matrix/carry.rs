//! Sends this program into labs, with a snapshot, and brings back what it says.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::Duration;

use amx_lab::{
    Cpu, Ending, Job, JobError, Kernel, Lab, LabOptions, MSR_MODULE, PrepareOptions, Quiet, Store,
    Streams, VMLINUX, guest_kernel, prepare,
};
use tempfile::TempDir;

use crate::support::{GUEST_KERNEL, JOB, job};
use crate::task::{SAID, SNAPSHOT, STOPPED, Said, Task, act};

/// No visit takes longer.
const LIMIT: Duration = Duration::from_secs(300);

/// A kind of host.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Place {
    pub(crate) kernel: Kernel,
    pub(crate) cpu: Cpu,
}

impl Place {
    pub(crate) fn with(kernel: Kernel) -> Self {
        Self {
            kernel,
            ..Self::default()
        }
    }
}

/// One test that visits labs.
pub(crate) struct Carrier {
    test: &'static str,
    store: Store,
    guests: BTreeMap<Kernel, TempDir>,
}

impl Carrier {
    /// Of the calling test. In a lab the task is done, and there is none.
    pub(crate) fn new(test: &'static str) -> Option<Self> {
        if let Some(task) = job() {
            act(&task);
            return None;
        }
        if std::env::var_os("AMX_LAB").is_some() {
            println!("skipped: this starts labs, and already runs in one: cargo matrix");
            return None;
        }
        let program = std::env::current_exe().expect("it has a path");
        if let Err(error @ JobError::Program { .. }) = Job::new(program) {
            println!("skipped: this sends itself into labs ({error} is not static): cargo matrix");
            return None;
        }
        let store = Store::open().expect("there is a place for the lab");
        let kernels = Kernel::ALL.to_vec();
        let options = PrepareOptions {
            kernels,
            ..PrepareOptions::default()
        };
        prepare(&store, &options, &Quiet).expect("the lab is prepared");
        let guests = Kernel::ALL.map(|kernel| {
            let folder = tempfile::tempdir().expect("there is room");
            guest_kernel(&store, kernel, folder.path()).expect("the kernel is whole");
            (kernel, folder)
        });
        Some(Self {
            test,
            store,
            guests: guests.into(),
        })
    }

    /// Does `task` in a lab of its own; gives what it says and the snapshot that it leaves.
    pub(crate) fn run(
        &self,
        place: Place,
        guest: Kernel,
        snapshot: Option<&[u8]>,
        task: &Task,
    ) -> (Said, Option<Vec<u8>>) {
        let folder = tempfile::tempdir().expect("there is room");
        let path = |name: &str| folder.path().join(name);
        let program = std::env::current_exe().expect("it has a path");
        let mut job = Job::new(program)
            .expect("it is static")
            .args([self.test, "--exact", "--ignored"])
            .args(["--nocapture", "--test-threads=1"])
            .env(JOB, serde_json::to_string(task).expect("it is plain data"))
            .env("RUST_BACKTRACE", "1")
            .out(path("out"));
        let kernel = self.guests[&guest].path();
        for name in [VMLINUX, MSR_MODULE] {
            let inside = Path::new(GUEST_KERNEL).join(name);
            job = job
                .file(kernel.join(name), Some(&inside))
                .expect("it is there");
        }
        if let Some(snapshot) = snapshot {
            fs::write(path("in"), snapshot).expect("there is room");
            let inside = Some(Path::new(SNAPSHOT));
            job = job.file(path("in"), inside).expect("it was written");
        }
        let options = LabOptions {
            kernel: place.kernel,
            cpu: place.cpu,
            ..LabOptions::default()
        };
        let mut lab = Lab::start(&self.store, &options).expect("the lab starts");
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let ending = lab.run(&job, Streams::to(&mut out, &mut err), Some(LIMIT));
        let text = || {
            let (out, err) = (String::from_utf8_lossy(&out), String::from_utf8_lossy(&err));
            format!("{place:?}, {task:?}:\n{out}\n{err}")
        };
        match ending {
            Ok(Ending::Exited(0)) => {}
            Ok(other) => panic!("{other:?}: {}", text()),
            Err(error) => panic!("{error}: {}", text()),
        }
        let said =
            fs::read(path("out").join(SAID)).unwrap_or_else(|error| panic!("{error}: {}", text()));
        let said = serde_json::from_slice(&said).expect("this program has written it");
        (said, fs::read(path("out").join(STOPPED)).ok())
    }
}
