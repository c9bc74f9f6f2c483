//! The fields of a value, by their paths, and the same value with one of them changed.

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

/// A longer sequence of numbers is bytes: some of them stand for all.
const BYTES: usize = 64;
const SOME: usize = 24;

/// Each field's path, and the value with this field changed: all ones of its type, and one bit.
pub(crate) fn changed<T: Serialize + DeserializeOwned + PartialEq>(value: &T) -> Vec<(String, T)> {
    let json = serde_json::to_value(value).expect("plain data");
    let mut paths = Vec::new();
    collect(&json, String::new(), &mut paths);
    let mut all = Vec::new();
    for path in paths {
        let before = json.pointer(&path).expect("it was found");
        let with = |new: Value| {
            let mut json = json.clone();
            *json.pointer_mut(&path).expect("it was found") = new;
            // Where the number is too large for the field, there is none.
            serde_json::from_value::<T>(json)
                .ok()
                .filter(|new| new != value)
        };
        if let Some(old) = before.as_bool() {
            all.extend(with(Value::from(!old)).map(|new| (path.clone(), new)));
            continue;
        }
        let ones = [
            u64::MAX,
            u64::from(u32::MAX),
            u64::from(u16::MAX),
            u64::from(u8::MAX),
        ];
        all.extend(
            ones.into_iter()
                .find_map(|ones| with(Value::from(ones)))
                .map(|new| (path.clone(), new)),
        );
        if let Some(old) = before.as_u64() {
            all.extend(with(Value::from(old ^ 1)).map(|new| (path.clone(), new)));
        }
    }
    all
}

fn collect(value: &Value, path: String, paths: &mut Vec<String>) {
    match value {
        Value::Object(fields) => {
            for (name, field) in fields {
                collect(field, format!("{path}/{name}"), paths);
            }
        }
        Value::Array(items) => {
            let step = if items.len() > BYTES {
                items.len().div_ceil(SOME)
            } else {
                1
            };
            for (index, item) in items.iter().enumerate().step_by(step) {
                collect(item, format!("{path}/{index}"), paths);
            }
        }
        Value::Bool(_) | Value::Number(_) => paths.push(path),
        Value::Null | Value::String(_) => {}
    }
}
