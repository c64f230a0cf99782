//! Damage to a file that was right: of its bytes, and of the values in it where it is text with values.
//!
//! Nothing here knows what a file is for; `harness` tries what comes out.

use pkv_core::Rng;
use rand::Rng as _;
use serde_json::{Value, json};

/// Pieces that parsers and templates know.
const WORDS: [&str; 33] = [
    "\u{feff}",
    "\0",
    "\r\n",
    "\"",
    "\\",
    "\\u0000",
    "\\ud800",
    "{",
    "}",
    "[",
    "]",
    "null",
    "-0",
    "1e999",
    "NaN",
    "inf",
    "=",
    "[[a]]",
    "''' ",
    "../",
    "%",
    "{{ ",
    " }}",
    "{% for i in range(99999) %}",
    "{% endfor %}",
    "{% set a = a ~ a %}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ messages }}",
    "{{ 'x' * 99999999 }}",
    "| tojson",
    "| join",
    "[::-1]",
    "\u{1b}[2J",
];
/// Placeholder for what is nested too deeply for a value of this program.
const DEEP: &str = "\"@deep@\"";

/// `file`, named `name`, damaged once or a few times.
pub fn damage(rng: &mut Rng, name: &str, file: &[u8]) -> Vec<u8> {
    let mut out = file.to_vec();
    for _ in 0..*pick(rng, &[1, 1, 1, 2, 4]) {
        // Values more often than bytes: most bytes only make a file unreadable.
        let text = if rng.random_range(0..4) == 0 { None } else { std::str::from_utf8(&out).ok() };
        let changed = match name.rsplit('.').next() {
            Some("json") => text.and_then(|t| json_text(rng, t)),
            Some("jsonl") => text.and_then(|t| line(rng, t)),
            Some("toml") => text.and_then(|t| toml_text(rng, t)),
            Some("safetensors") if rng.random_range(0..4) > 0 => header(rng, &out),
            _ => None,
        };
        out = changed.unwrap_or_else(|| bytes(rng, out));
    }
    out
}

pub fn pick<'a, T>(rng: &mut Rng, from: &'a [T]) -> &'a T {
    &from[rng.random_range(0..from.len())]
}

/// A place; often near the beginning or the end, where headers and footers are.
fn place(rng: &mut Rng, len: usize) -> usize {
    match rng.random_range(0..3) {
        0 => rng.random_range(0..len.min(300)),
        1 => len - 1 - rng.random_range(0..len.min(3000)),
        _ => rng.random_range(0..len),
    }
}

fn bytes(rng: &mut Rng, mut data: Vec<u8>) -> Vec<u8> {
    if data.is_empty() {
        return pick(rng, &WORDS).as_bytes().to_vec();
    }
    let at = place(rng, data.len());
    let end = (at + rng.random_range(1..64)).min(data.len());
    match rng.random_range(0..8) {
        0 => data[at] ^= 1 << rng.random_range(0..8),
        1 => data[at] = *pick(rng, &[0, 1, 0x7f, 0x80, 0xff, b'9', b'"']),
        2 => drop(data.drain(at..end)),
        3 => data.truncate(at),
        4 => drop(data.splice(at..at, data[at..end].to_vec())),
        5 => data[at..end].fill(*pick(rng, &[0, 0xff])),
        6 => {
            // A number as formats write it.
            let number =
                pick(rng, &[0u64, 1, u32::MAX.into(), 1 << 31, 1 << 40, 1 << 62, u64::MAX]).to_le_bytes();
            let end = (at + 8).min(data.len());
            data[at..end].copy_from_slice(&number[..end - at]);
        }
        _ => drop(data.splice(at..at, pick(rng, &WORDS).bytes())),
    }
    data
}

fn json_text(rng: &mut Rng, text: &str) -> Option<Vec<u8>> {
    let mut value = serde_json::from_str(text).ok()?;
    change(rng, &mut value);
    Some(deep(rng, &value.to_string()).into_bytes())
}

fn line(rng: &mut Rng, text: &str) -> Option<Vec<u8>> {
    let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
    let at = rng.random_range(0..lines.len().max(1));
    let changed = json_text(rng, lines.get(at)?)?;
    lines[at] = String::from_utf8(changed).ok()?;
    Some((lines.join("\n") + "\n").into_bytes())
}

fn toml_text(rng: &mut Rng, text: &str) -> Option<Vec<u8>> {
    let mut value = serde_json::to_value(toml::from_str::<toml::Value>(text).ok()?).ok()?;
    change(rng, &mut value);
    // TOML has no null.
    Some(deep(rng, &toml::to_string(&toml::Value::try_from(value).ok()?).ok()?).into_bytes())
}

/// The header of a safetensors file.
fn header(rng: &mut Rng, data: &[u8]) -> Option<Vec<u8>> {
    let length = usize::try_from(u64::from_le_bytes(data.get(..8)?.try_into().ok()?)).ok()?;
    let text = std::str::from_utf8(data.get(8..)?.get(..length)?).ok()?;
    let header = json_text(rng, text)?;
    let mut out = (header.len() as u64).to_le_bytes().to_vec();
    out.extend(header);
    out.extend(&data[8 + length..]);
    Some(out)
}

fn deep(rng: &mut Rng, text: &str) -> String {
    if !text.contains(DEEP) {
        return text.to_owned();
    }
    let n = *pick(rng, &[100, 1000, 100_000]);
    text.replace(DEEP, &format!("{}{}", "[".repeat(n), "]".repeat(n)))
}

/// Change one value somewhere in `value`.
fn change(rng: &mut Rng, value: &mut Value) {
    let count = nodes(value);
    let other = get(value, &mut rng.random_range(0..count)).map(|v| v.clone()).unwrap_or_default();
    let Some(node) = get(value, &mut rng.random_range(0..count)) else { return };
    match (rng.random_range(0..6), &mut *node) {
        (0, Value::Object(map)) if !map.is_empty() => {
            let key = pick(rng, &map.keys().cloned().collect::<Vec<_>>()).clone();
            map.remove(&key);
        }
        (1, Value::Object(map)) if !map.is_empty() => {
            let key = pick(rng, &map.keys().cloned().collect::<Vec<_>>()).clone();
            let moved = map.remove(&key).unwrap_or_default();
            map.insert(format!("{key}{}", pick(rng, &["", "x", "\u{1b}[2J", "/../x"])), moved);
        }
        (0, Value::Array(list)) if !list.is_empty() => drop(list.remove(rng.random_range(0..list.len()))),
        (1, Value::Array(list)) if !list.is_empty() => {
            let one = pick(rng, list).clone();
            let times = *pick(rng, &[1, 2, 1000]);
            list.extend(std::iter::repeat_n(one, times));
        }
        (2, Value::Number(n)) => {
            let x = n.as_f64().unwrap_or_default();
            *node = pick(
                rng,
                &[
                    json!(x + 1.0),
                    json!(-x),
                    json!(x * 1e6),
                    json!((x as i64).wrapping_sub(1)),
                    json!((x as u64).wrapping_mul(2)),
                ],
            )
            .clone();
        }
        (2, Value::String(text)) => {
            let at = text.char_indices().map(|c| c.0).chain([text.len()]).collect::<Vec<_>>();
            let at = *pick(rng, &at);
            text.insert_str(at, pick::<&str>(rng, &WORDS));
        }
        (3, _) => *node = other,
        _ => *node = odd(rng),
    }
}

fn odd(rng: &mut Rng) -> Value {
    let huge = || "x".repeat(200_000);
    match rng.random_range(0..20) {
        0 => json!(null),
        1 => json!(true),
        2 => json!(0),
        3 => json!(-1),
        4 => json!(1),
        5 => json!(1u64 << 31),
        6 => json!(1u64 << 40),
        7 => json!(1u64 << 62),
        8 => json!(u64::MAX),
        9 => json!(i64::MIN),
        10 => json!(1e308),
        11 => json!(1e-308),
        12 => json!(0.5),
        13 => json!(""),
        14 => json!(pick(
            rng,
            &["../../x", "/dev/zero", "/", ".", "a\0b", "\u{feff}", "\u{1b}]0;x\u{7}", "main", "NaN"]
        )),
        15 => json!(huge()),
        16 => json!([]),
        17 => json!({}),
        18 => json!(vec![0; 100_000]),
        _ => json!(DEEP.trim_matches('"')),
    }
}

fn nodes(value: &Value) -> usize {
    1 + match value {
        Value::Array(list) => list.iter().map(nodes).sum::<usize>(),
        Value::Object(map) => map.values().map(nodes).sum(),
        _ => 0,
    }
}

/// Value number `n` in reading order.
fn get<'a>(value: &'a mut Value, n: &mut usize) -> Option<&'a mut Value> {
    if *n == 0 {
        return Some(value);
    }
    *n -= 1;
    let mut within: Box<dyn Iterator<Item = &'a mut Value>> = match value {
        Value::Array(list) => Box::new(list.iter_mut()),
        Value::Object(map) => Box::new(map.values_mut()),
        _ => return None,
    };
    within.find_map(|v| get(v, n))
}
