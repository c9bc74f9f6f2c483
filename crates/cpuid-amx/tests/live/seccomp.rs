//! Answers of the kernel that this machine cannot provoke.

use std::collections::BTreeMap;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

/// Runs `test` on a thread where system call `number` with `value` as argument `argument` (0 to 5)
/// gives `errno` and does nothing. Errno 0 is success.
pub(crate) fn with_errno<T: Send>(
    number: libc::c_long,
    argument: u8,
    value: u32,
    errno: i32,
    test: impl FnOnce() -> T + Send,
) -> T {
    let condition = SeccompCondition::new(
        argument,
        SeccompCmpArgLen::Dword,
        SeccompCmpOp::Eq,
        value.into(),
    );
    let rule = SeccompRule::new(vec![condition.unwrap()]).unwrap();
    let filter: BpfProgram = SeccompFilter::new(
        BTreeMap::from([(number, vec![rule])]),
        SeccompAction::Allow,
        SeccompAction::Errno(errno.try_into().unwrap()),
        TargetArch::x86_64,
    )
    .unwrap()
    .try_into()
    .unwrap();
    std::thread::scope(|scope| {
        let filtered = scope.spawn(|| {
            seccompiler::apply_filter(&filter).unwrap();
            test()
        });
        filtered.join().unwrap()
    })
}
