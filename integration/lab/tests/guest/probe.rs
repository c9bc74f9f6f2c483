//! A program that the tests run in the lab: does what its first argument says.

use std::io::{Read, Write};
use std::os::unix::process::CommandExt;
use std::process::{Command, exit};

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match args[1..] {
        ["exit", status] => exit(status.parse().unwrap()),
        ["abort"] => std::process::abort(),
        ["echo", ..] => {
            println!("{}", args[2..].join("|"));
            eprintln!("argv0 {}", args[0]);
        }
        ["env"] => std::env::vars().for_each(|(name, value)| println!("{name}={value}")),
        ["directory"] => println!("{}", std::env::current_dir().unwrap().display()),
        ["cat", path] => std::io::stdout().write_all(&std::fs::read(path).unwrap()).unwrap(),
        ["stdin"] => {
            let mut input = Vec::new();
            std::io::stdin().read_to_end(&mut input).unwrap();
            println!("{} bytes, sum {}", input.len(), input.iter().map(|byte| u64::from(*byte)).sum::<u64>());
        }
        // Both streams, bytes of all values, more than any pipe holds.
        ["pour", bytes] => {
            let data: Vec<u8> = (0..bytes.parse::<usize>().unwrap()).map(|at| (at % 251) as u8).collect();
            std::thread::scope(|scope| {
                scope.spawn(|| std::io::stdout().write_all(&data).unwrap());
                scope.spawn(|| std::io::stderr().write_all(&data).unwrap());
            });
        }
        ["endless"] => loop {
            println!("{}", "x".repeat(1000));
        },
        ["slowly"] => {
            println!("first");
            // Waits for ever, if need be: the test looks whether the line comes before the end.
            let _ = std::io::stdin().read(&mut [0]);
            println!("second");
        }
        ["hang"] => {
            println!("hanging");
            loop {
                std::thread::park();
            }
        }
        ["out", bytes] => {
            let out = std::env::var("AMX_LAB_OUT").unwrap();
            std::fs::create_dir(format!("{out}/deep")).unwrap();
            let data: Vec<u8> = (0..bytes.parse::<usize>().unwrap()).map(|at| (at % 241) as u8).collect();
            std::fs::write(format!("{out}/deep/data"), data).unwrap();
            std::os::unix::fs::symlink("deep/data", format!("{out}/link")).unwrap();
        }
        ["bad-names"] => {
            use std::os::unix::ffi::OsStrExt;
            let out = std::path::PathBuf::from(std::env::var_os("AMX_LAB_OUT").unwrap());
            for name in [b"good".as_slice(), b"no-\xff-text", b"TRAILER!!!", b"z"] {
                std::fs::write(out.join(std::ffi::OsStr::from_bytes(name)), name).unwrap();
            }
            exit(5);
        }
        // Leaves a child behind that holds the streams open.
        ["leave"] => {
            Command::new("/proc/self/exe").arg0("left").arg("hang").spawn().unwrap();
            println!("leaving");
        }
        ["panic"] => {
            println!("before");
            std::fs::write("/proc/sysrq-trigger", "c").unwrap();
        }
        ["reboot"] => std::fs::write("/proc/sysrq-trigger", "b").unwrap(),
        ["lab"] => {
            println!("{}", std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap().trim());
            println!("clock {}", std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs());
            let mut random = [0; 8];
            std::fs::File::open("/dev/urandom").unwrap().read_exact(&mut random).unwrap();
            println!("random {random:?}");
            let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap();
            for flag in ["vmx", "amx_tile", "amx_int8", "amx_bf16", "avx512f", "pku"] {
                println!("{flag} {}", cpu.split_whitespace().any(|word| word == flag));
            }
            println!("kvm {}", std::fs::File::open("/dev/kvm").is_ok());
            let socket = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
            std::net::TcpStream::connect(socket.local_addr().unwrap()).unwrap();
            println!("loopback true");
        }
        ["eat"] => {
            println!("eating");
            let mut eaten = Vec::new();
            loop {
                eaten.push(vec![1_u8; 1 << 20]);
            }
        }
        ["cpus"] => {
            let online = || std::fs::read_to_string("/sys/devices/system/cpu/online").unwrap();
            let switch = |on: &str| std::fs::write("/sys/devices/system/cpu/cpu1/online", on).unwrap();
            let count = || std::thread::available_parallelism().unwrap();
            print!("{} {}", count(), online());
            switch("0");
            print!("{} {}", count(), online());
            switch("1");
            print!("{} {}", count(), online());
            // Each of several threads that wait for each other has a processor.
            let here = std::sync::atomic::AtomicUsize::new(0);
            std::thread::scope(|scope| {
                for _ in 0..count().get() {
                    scope.spawn(|| {
                        here.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
                        while here.load(std::sync::atomic::Ordering::SeqCst) < count().get() {
                            std::hint::spin_loop();
                        }
                    });
                }
            });
        }
        ["mark"] => {
            println!("was here {}", std::path::Path::new("/tmp/mark").exists());
            std::fs::write("/tmp/mark", "x").unwrap();
        }
        _ => exit(99),
    }
}
