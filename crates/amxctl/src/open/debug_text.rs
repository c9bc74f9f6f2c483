//! The text that Rust's `{:#?}` gives, as events: what opens, what closes, and values.

use super::OpenError;

/// Nothing is nested deeper in what is read here.
const MAX_DEPTH: usize = 64;

/// What one line of the text says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Event<'a> {
    /// A structure, list or tuple begins; with the field that it is, if it is one.
    Open(Option<&'a str>),
    /// The structure, list or tuple that began last ends.
    Close,
    /// A value; with the field that it is, if it is one.
    Value(Option<&'a str>, &'a str),
    /// A line of another kind, at the outermost level.
    Title(&'a str),
}

/// Calls `each` with the fields that a line is in, from the outermost, and with the line.
pub(super) fn events<'a>(
    text: &'a str,
    mut each: impl FnMut(&[&'a str], Event<'a>, Line<'a>) -> Result<(), OpenError>,
) -> Result<(), OpenError> {
    let mut stack: Vec<&str> = Vec::new();
    let mut offset = 0usize;
    let mut last = Line {
        offset: 0,
        number: 1,
        text: "",
    };
    for (number, whole) in (1..).zip(text.split_inclusive('\n')) {
        let line = Line {
            offset,
            number,
            text: whole.trim(),
        };
        offset = offset.saturating_add(whole.len());
        if line.text.is_empty() {
            continue;
        }
        last = line;
        let event = event(line.text, stack.is_empty());
        match event {
            Event::Open(field) => {
                each(&stack, event, line)?;
                if stack.len() >= MAX_DEPTH {
                    return Err(line.error("nothing nested deeper than 64"));
                }
                stack.push(field.unwrap_or(""));
            }
            Event::Close => {
                if stack.pop().is_none() {
                    return Err(line.error("a value, because nothing is open"));
                }
                each(&stack, event, line)?;
            }
            Event::Value(..) | Event::Title(_) => each(&stack, event, line)?,
        }
    }
    if stack.is_empty() {
        Ok(())
    } else {
        Err(last.error("a closing bracket behind it"))
    }
}

/// A line, for errors.
#[derive(Clone, Copy, Debug)]
pub(super) struct Line<'a> {
    pub(super) offset: usize,
    pub(super) number: usize,
    pub(super) text: &'a str,
}

impl Line<'_> {
    pub(super) fn error(&self, expected: &'static str) -> OpenError {
        OpenError::Text {
            offset: self.offset,
            line: self.number,
            expected,
            found: self.text.chars().take(60).collect(),
        }
    }
}

fn event(line: &str, outermost: bool) -> Event<'_> {
    let text = line.strip_suffix(',').unwrap_or(line);
    if matches!(text, "}" | "]" | ")") {
        return Event::Close;
    }
    let (field, value) = match text.split_once(": ") {
        Some((field, value)) => (Some(field), value),
        None => (None, text),
    };
    if value.ends_with(['{', '[', '(']) {
        return Event::Open(field);
    }
    if outermost {
        return Event::Title(line);
    }
    Event::Value(field, value)
}
