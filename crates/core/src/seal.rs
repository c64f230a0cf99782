//! JSON objects that hold their own hash: a flipped digit is no other number.
//!
//! The member `sha256` at an object's end is the SHA-256 of the object without it, written without blanks.
//! Objects without one are of earlier versions, or were edited on purpose; they are taken as they are.

use serde_json::Value;

use crate::{hinted, sha256_hex};

/// Name of the member.
const SEAL: &str = "sha256";

/// `object`, the text of a JSON object, with its hash as the last member.
///
/// # Panics
/// The text is no JSON object.
pub fn seal(object: &str) -> String {
    let value: Value = serde_json::from_str(object).expect("what was written as JSON is JSON");
    let members = value.as_object().expect("an object is sealed").len();
    let body = object.trim_end().strip_suffix('}').expect("an object ends in a brace").trim_end();
    let comma = if members > 0 { "," } else { "" };
    // As the rest is written: indented, or on one line.
    let (before, blank, after) = if body.contains('\n') { ("\n  ", " ", "\n") } else { ("", "", "") };
    format!("{body}{comma}{before}\"{SEAL}\":{blank}\"{}\"{after}}}", hash(&value))
}

/// Take the hash out of `value`, if it holds one, and compare.
///
/// # Errors
/// The object is not as it was when it was written.
pub fn unseal(value: &mut Value) -> Result<(), crate::Hinted> {
    let Some(expected) = value.as_object_mut().and_then(|object| object.shift_remove(SEAL)) else {
        return Ok(());
    };
    let found = hash(value);
    if expected == *found {
        return Ok(());
    }
    Err(hinted(
        format!(
            "it is damaged, or was edited: expected SHA-256 {} of its content, found {found}",
            expected.as_str().unwrap_or("none")
        ),
        format!("if you changed it on purpose, remove its member `{SEAL}`"),
    ))
}

fn hash(value: &Value) -> String {
    sha256_hex(value.to_string().as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 0.1 and 1e-7 are written in several ways; f32 are shorter than the f64 that are read.
    const OBJECT: &str =
        "{\"b\": [0.1, 1e-7, 18446744073709551615], \"a\": {\"sha256\": \"x\", \"text\": \"ä\\n}\"}}";

    fn unsealed(text: &str) -> Result<Value, crate::Hinted> {
        let mut value = serde_json::from_str(text).unwrap();
        unseal(&mut value).map(|()| value)
    }

    #[test]
    fn sealed_objects_read_as_they_were_and_any_changed_digit_is_noticed() {
        let plain: Value = serde_json::from_str(OBJECT).unwrap();
        let pretty = serde_json::to_string_pretty(&plain).unwrap() + "\n";
        for text in [OBJECT, &pretty, "{}", "{}\n"] {
            let sealed = seal(text);
            let value: Value = serde_json::from_str(text).unwrap();
            assert_eq!(unsealed(&sealed).unwrap(), value, "{sealed}");
            // Another layout of the same values, as editors make it.
            let other = serde_json::from_str::<Value>(&sealed).unwrap().to_string();
            assert_eq!(unsealed(&other).unwrap(), value, "{other}");
            assert_eq!(unsealed(text).unwrap(), value, "without a hash it is taken as it is");
            for (i, _) in sealed.char_indices().filter(|(_, c)| c.is_ascii_digit()) {
                let digit = (sealed.as_bytes()[i] - b'0' + 1) % 10;
                let flipped = format!("{}{digit}{}", &sealed[..i], &sealed[i + 1..]);
                let Ok(mut value) = serde_json::from_str::<Value>(&flipped) else { continue };
                match unseal(&mut value) {
                    Err(e) => assert!(e.hint().contains("remove its member"), "{e}"),
                    // The member's name, which readers then refuse or leave alone: the rest is as it was.
                    Ok(()) => {
                        assert!(flipped.contains("\"sha256\"") || value.get(SEAL).is_none(), "{flipped}")
                    }
                }
            }
        }
        assert!(seal(&pretty).ends_with("\"\n}"), "{}", seal(&pretty));
    }
}
