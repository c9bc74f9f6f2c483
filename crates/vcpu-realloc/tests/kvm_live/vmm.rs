//! The VMMs of the tests.

use vcpu_realloc::{Answer, Grow, Request};

/// One that must not be asked.
pub(crate) fn never(request: &Request) -> Result<Answer, String> {
    Err(format!(
        "nothing was to be used for the first time: {request:?}"
    ))
}

/// One that grants, and remembers what it was asked.
#[derive(Debug, Default)]
pub(crate) struct Grants(pub(crate) Vec<Request>);

impl Grow for Grants {
    type Error = String;

    fn grow(&mut self, request: &Request) -> Result<Answer, String> {
        self.0.push(*request);
        Ok(Answer::Grant)
    }
}

/// One that has no memory.
pub(crate) fn fails(_: &Request) -> Result<Answer, String> {
    Err("no memory".into())
}
