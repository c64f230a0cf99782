//! Python features that templates use and minijinja lacks: printing of values, string methods, `%`, JSON,
//! dates.
//!
//! The size of results is limited by `limits`.

use std::fmt::{self, Write};

use minijinja::value::{Kwargs, Value as Jinja, ValueKind};
use minijinja::{Error, ErrorKind, FormatStyle, State, format_filter};
use minijinja_contrib::pycompat::unknown_method_callback;
use serde::Serialize;
use serde_json::ser::{Formatter, PrettyFormatter, Serializer};

use super::filters::bind;

/// Write a value as Python's `str` does.
pub(super) fn display(value: &Jinja, out: &mut dyn Write) -> fmt::Result {
    match value.kind() {
        ValueKind::Seq | ValueKind::Iterable | ValueKind::Map => repr(value, out, 0),
        _ => plain(value, out),
    }
}

/// What has no parts. Python writes floats with an exponent from 1e16 on and below 1e-4.
fn plain(value: &Jinja, out: &mut dyn Write) -> fmt::Result {
    let float = f64::try_from(value.clone()).ok();
    match float.filter(|f| value.is_number() && !value.is_integer() && f.is_finite()) {
        Some(float) => out.write_str(&python_float(float)),
        None => write!(out, "{value}"),
    }
}

fn python_float(float: f64) -> String {
    let scientific = format!("{float:e}");
    match scientific.split_once('e').and_then(|(digits, e)| Some((digits, e.parse::<i32>().ok()?))) {
        Some((digits, e)) if e >= 16 => format!("{digits}e+{e:02}"),
        Some((digits, e)) if e < -4 => format!("{digits}e-{:02}", -e),
        _ => format!("{float:?}"),
    }
}

/// The test `iterable`: texts are, and what is undefined; `none` is not.
pub(super) fn is_iterable(value: &Jinja) -> bool {
    value.as_str().is_some() || !value.is_none() && value.try_iter().is_ok()
}

/// `is sequence`: what has a length and items by key, texts and dicts among it.
pub(super) fn is_sequence(value: &Jinja) -> bool {
    matches!(value.kind(), ValueKind::String | ValueKind::Seq | ValueKind::Map | ValueKind::Bytes)
}

/// `is number`: truth values are numbers in Python.
pub(super) fn is_number(value: &Jinja) -> bool {
    matches!(value.kind(), ValueKind::Number | ValueKind::Bool)
}

/// As Python's `repr`, which `str` uses within lists and dicts.
fn repr(value: &Jinja, out: &mut dyn Write, depth: usize) -> fmt::Result {
    // Deeper values come from templates that are made to exhaust the stack.
    if depth > 100 {
        return Err(fmt::Error);
    }
    match value.kind() {
        ValueKind::String => {
            let text = value.as_str().unwrap_or_default();
            let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
            out.write_char(quote)?;
            for c in text.chars() {
                match c {
                    '\n' => out.write_str("\\n")?,
                    '\r' => out.write_str("\\r")?,
                    '\t' => out.write_str("\\t")?,
                    '\\' => out.write_str("\\\\")?,
                    c if c == quote => write!(out, "\\{c}")?,
                    // The mark of a message stays whole, so that it is found again.
                    '\u{1}' => out.write_char(c)?,
                    c if c.is_control() => write!(out, "\\x{:02x}", u32::from(c))?,
                    c => out.write_char(c)?,
                }
            }
            out.write_char(quote)
        }
        ValueKind::Seq | ValueKind::Iterable => {
            out.write_char('[')?;
            for (i, item) in value.try_iter().map_err(|_| fmt::Error)?.enumerate() {
                if i > 0 {
                    out.write_str(", ")?;
                }
                repr(&item, out, depth + 1)?;
            }
            out.write_char(']')
        }
        ValueKind::Map => {
            out.write_char('{')?;
            for (i, key) in value.try_iter().map_err(|_| fmt::Error)?.enumerate() {
                if i > 0 {
                    out.write_str(", ")?;
                }
                repr(&key, out, depth + 1)?;
                out.write_str(": ")?;
                repr(&value.get_item(&key).unwrap_or_default(), out, depth + 1)?;
            }
            out.write_char('}')
        }
        _ => plain(value, out),
    }
}

/// Methods of Python's texts and lists: minijinja-contrib's, and what templates use besides.
pub(super) fn method(state: &State, value: &Jinja, name: &str, args: &[Jinja]) -> Result<Jinja, Error> {
    let text = |i: usize| args.get(i).and_then(Jinja::as_str);
    let cut = |at: Option<usize>, len: usize, s: &str, last: bool| -> Jinja {
        let (whole, empty) = (s.to_owned(), String::new());
        Jinja::from(match (at, last) {
            (Some(at), _) => vec![s[..at].to_owned(), s[at..at + len].to_owned(), s[at + len..].to_owned()],
            (None, false) => vec![whole, empty.clone(), empty],
            (None, true) => vec![empty.clone(), empty, whole],
        })
    };
    let Some(s) = value.as_str() else {
        let equal = |of: &Jinja| args.first() == Some(of);
        return match (name, value.kind(), args.len()) {
            ("count", ValueKind::Seq, 1) => Ok(Jinja::from(value.try_iter()?.filter(equal).count())),
            ("index", ValueKind::Seq, 1) => {
                let at = value.try_iter()?.position(|item| equal(&item));
                at.map(Jinja::from).ok_or_else(|| invalid("index: the list does not hold it"))
            }
            _ => unknown_method_callback(state, value, name, args),
        };
    };
    // Arguments that have names.
    let names: &[&str; 2] = match name {
        "split" | "rsplit" => &["sep", "maxsplit"],
        "splitlines" => &["keepends", ""],
        _ => &["", ""],
    };
    if args.last().is_some_and(Jinja::is_kwargs) && !names[0].is_empty() {
        let [first, second] = bind(name, args, *names)?;
        let given: Vec<Jinja> = match second {
            Some(second) => vec![first.unwrap_or_else(|| Jinja::from(())), second],
            None => first.into_iter().collect(),
        };
        return method(state, value, name, &given);
    }
    Ok(match (name, args.len(), text(0)) {
        // No letter is of any kind.
        (test, 0, _) if test.starts_with("is") && test != "isascii" && s.is_empty() => Jinja::from(false),
        ("isupper" | "islower", 0, _) => {
            let (mut upper, mut lower) =
                (s.chars().filter(|c| c.is_uppercase()), s.chars().filter(|c| c.is_lowercase()));
            Jinja::from(match name {
                "isupper" => upper.next().is_some() && lower.next().is_none(),
                _ => lower.next().is_some() && upper.next().is_none(),
            })
        }
        ("title", 0, _) => {
            let mut after = false;
            let letter = |c: char| -> String {
                let begins = !std::mem::replace(&mut after, c.is_alphabetic());
                if begins { c.to_uppercase().collect() } else { c.to_lowercase().collect() }
            };
            Jinja::from(s.chars().map(letter).collect::<String>())
        }
        ("swapcase", 0, _) => {
            let swap = |c: char| -> String {
                if c.is_uppercase() { c.to_lowercase().collect() } else { c.to_uppercase().collect() }
            };
            Jinja::from(s.chars().map(swap).collect::<String>())
        }
        ("removeprefix", 1, Some(part)) => Jinja::from(s.strip_prefix(part).unwrap_or(s)),
        ("removesuffix", 1, Some(part)) => Jinja::from(s.strip_suffix(part).unwrap_or(s)),
        ("partition", 1, Some(part)) if !part.is_empty() => cut(s.find(part), part.len(), s, false),
        ("rpartition", 1, Some(part)) if !part.is_empty() => cut(s.rfind(part), part.len(), s, true),
        ("rsplit", 0..=2, part) if part != Some("") => {
            let limit = args.get(1).and_then(Jinja::as_usize).map_or(usize::MAX, |n| n.saturating_add(1));
            let mut pieces: Vec<&str> = match part {
                Some(part) => s.rsplitn(limit, part).collect(),
                None => blanks_from_the_right(s, limit),
            };
            pieces.reverse();
            pieces.into_iter().map(Jinja::from).collect()
        }
        ("casefold", 0, _) => Jinja::from(s.to_lowercase()),
        ("zfill", 1, _) => {
            let width = args[0].as_usize().unwrap_or(0);
            let (sign, digits) = s.split_at(usize::from(s.starts_with(['+', '-'])));
            Jinja::from(format!("{sign}{}{digits}", "0".repeat(width.saturating_sub(s.chars().count()))))
        }
        ("ljust" | "rjust" | "center", 1 | 2, _) => {
            padded(name, s, args[0].as_usize().unwrap_or(0), text(1).unwrap_or(" "))
        }
        ("index" | "rindex", 1, Some(part)) => {
            let at = if name == "index" { s.find(part) } else { s.rfind(part) };
            let at = at.ok_or_else(|| invalid("substring not found"))?;
            Jinja::from(s[..at].chars().count())
        }
        _ => return unknown_method_callback(state, value, name, args),
    })
}

/// A text filled up to `width` letters.
pub(super) fn padded(method: &str, s: &str, width: usize, fill: &str) -> Jinja {
    let room = width.saturating_sub(s.chars().count());
    // Python's `center` puts the odd blank to the left where text and width are both odd or the width is.
    let left = match method {
        "ljust" => 0,
        "rjust" => room,
        _ => room / 2 + (room & (room + s.chars().count()) & 1),
    };
    Jinja::from(format!("{}{s}{}", fill.repeat(left), fill.repeat(room - left)))
}

/// The text of a template's literal, what is between its quotes, decoded as Python's `unicode-escape`.
///
/// # Errors
/// An escape is cut off, no character, or a character by its name.
pub(super) fn unescaped(literal: &str) -> Result<String, Error> {
    let (mut out, mut rest) = (String::with_capacity(literal.len()), literal);
    while let Some(at) = rest.find('\\') {
        out.push_str(&rest[..at]);
        let code = rest[at + 1..].chars().next().ok_or_else(|| invalid("a text ends with a backslash"))?;
        let after = &rest[at + 1 + code.len_utf8()..];
        let simple = |c: char| Some((c, 0));
        let number = |digits: &str, base: u32| u32::from_str_radix(digits, base).ok();
        let hex = |digits: usize| {
            let code = number(after.get(..digits)?, 16)?;
            let low = || number(after.get(digits..)?.strip_prefix("\\u")?.get(..4)?, 16);
            match code {
                // Two halves of one character.
                0xd800..=0xdbff if digits == 4 => {
                    let low = low().filter(|low| (0xdc00..=0xdfff).contains(low))?;
                    Some((char::from_u32(0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00))?, 10))
                }
                _ => Some((char::from_u32(code)?, digits)),
            }
        };
        let decoded = match code {
            '\n' => {
                rest = after;
                continue;
            }
            '\\' | '\'' | '"' => simple(code),
            'a' => simple('\x07'),
            'b' => simple('\x08'),
            'f' => simple('\x0c'),
            'n' => simple('\n'),
            'r' => simple('\r'),
            't' => simple('\t'),
            'v' => simple('\x0b'),
            'x' => hex(2),
            'u' => hex(4),
            'U' => hex(8),
            'N' => None,
            '0'..='7' => {
                let more = after.bytes().take(2).take_while(|b| (b'0'..=b'7').contains(b)).count();
                number(&rest[at + 1..at + 2 + more], 8).and_then(char::from_u32).map(|c| (c, more))
            }
            _ => {
                out.push('\\');
                Some((code, 0))
            }
        };
        let (c, taken) = decoded
            .ok_or_else(|| invalid(format!("a text has an escape `\\{code}` that is no character")))?;
        out.push(c);
        rest = &after[taken..];
    }
    Ok(out + rest)
}

/// `rsplit()` at blanks: the pieces from the last to the first, at most `limit`.
fn blanks_from_the_right(s: &str, limit: usize) -> Vec<&str> {
    let (mut rest, mut pieces) = (s.trim_end(), Vec::new());
    while pieces.len() + 1 < limit
        && let Some(at) = rest.rfind(char::is_whitespace)
    {
        let width = rest[at..].chars().next().map_or(1, char::len_utf8);
        pieces.push(&rest[at + width..]);
        rest = rest[..at].trim_end();
    }
    if !rest.is_empty() {
        pieces.push(rest);
    }
    pieces
}

/// `format % values`: several values come as a list, as many as the format takes.
pub(super) fn percent(format: &str, values: &Jinja) -> Result<String, Error> {
    let takes = format.replace("%%", "").matches('%').count();
    let several = matches!(values.kind(), ValueKind::Seq) && values.len() == Some(takes);
    let args: Vec<Jinja> = if several { values.try_iter()?.collect() } else { vec![values.clone()] };
    // Lists, objects, truth values and `none` are printed as Python prints them.
    let printed = |arg: Jinja| match arg.kind() {
        ValueKind::String | ValueKind::Number => Ok(arg),
        _ => {
            let mut text = String::new();
            display(&arg, &mut text).map_err(|_| invalid("a value is nested too deep"))?;
            Ok(Jinja::from(text))
        }
    };
    let args = args.into_iter().map(printed).collect::<Result<Vec<_>, Error>>()?;
    format_filter(FormatStyle::Printf, format, &args)
}

/// The filter `title`: a capital after a blank, a hyphen or a bracket, and small letters otherwise.
pub(super) fn title(text: &str) -> String {
    let mut begins = true;
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if begins {
            out.extend(c.to_uppercase());
        } else {
            out.extend(c.to_lowercase());
        }
        begins = c.is_whitespace() || "-({[<".contains(c);
    }
    out
}

/// The filter `round`: halves to the even neighbour, as Python's; whole numbers stay whole.
pub(super) fn round(value: Jinja, digits: Option<i32>) -> Result<Jinja, Error> {
    if value.is_integer() {
        return Ok(value);
    }
    let (number, scale) = (f64::try_from(value)?, 10f64.powi(digits.unwrap_or(0).clamp(-300, 300)));
    let rounded = (number * scale).round_ties_even() / scale;
    Ok(Jinja::from(if rounded.is_finite() { rounded } else { number }))
}

/// The filter `pprint` of what fits into a line; Python breaks others.
pub(super) fn pprint(value: &Jinja) -> Result<String, Error> {
    let mut text = String::new();
    repr(value, &mut text, 0).map_err(|_| invalid("a value is nested too deep"))?;
    if text.chars().count() > 80 { Err(invalid("pprint: a value of more than a line")) } else { Ok(text) }
}

pub(super) fn raise_exception(message: String) -> Result<Jinja, Error> {
    Err(invalid(message))
}

pub(super) fn invalid(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, message.into())
}

/// Today's date for templates that state it: always 26 July 2024.
///
/// The prefix is part of every label. Were it the day on which a stage runs, labels and the cache
/// they are used on would differ from one day to the next. Llama 3.1's and 3.2's templates fall
/// back to this date themselves.
pub(super) fn strftime_now(format: &str) -> Result<String, Error> {
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        // `%-d` is `%d` without its leading zero; this date has none to lose but in its month.
        let (bare, code) = match chars.next() {
            Some('-') => (true, chars.next()),
            code => (false, code),
        };
        out.push_str(match code {
            Some('d' | 'e') => "26",
            Some('m') if bare => "7",
            Some('m') => "07",
            Some('b' | 'h') => "Jul",
            Some('B') => "July",
            Some('Y') => "2024",
            Some('y') => "24",
            Some('a') => "Fri",
            Some('A') => "Friday",
            Some('j') => "208",
            Some('F') => "2024-07-26",
            Some('D' | 'x') => "07/26/24",
            Some('c') => "Fri Jul 26 00:00:00 2024",
            // Midnight.
            Some('H' | 'M' | 'S') if bare => "0",
            Some('H' | 'M' | 'S') => "00",
            Some('I' | 'l') => "12",
            Some('k') => " 0",
            Some('p') => "AM",
            Some('P') => "am",
            Some('R') => "00:00",
            Some('T' | 'X') => "00:00:00",
            Some('r') => "12:00:00 AM",
            Some('f') => "000000",
            Some('z' | 'Z') => "",
            // The day and the week of the year.
            Some('u' | 'w') => "5",
            Some('U') => "29",
            Some('V' | 'W') => "30",
            Some('C') => "20",
            Some('G') => "2024",
            Some('g') => "24",
            Some('n') => "\n",
            Some('t') => "\t",
            Some('%') => "%",
            other => {
                let text = format!("strftime_now: `%{}` is not supported", other.unwrap_or(' '));
                return Err(Error::new(ErrorKind::InvalidOperation, text));
            }
        });
    }
    Ok(out)
}

/// JSON as Python's `json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)` writes it, the former false
/// by default. Its other options are refused.
pub(super) fn tojson(value: Jinja, kwargs: Kwargs) -> Result<String, Error> {
    let (indent, ascii): (Option<usize>, Option<bool>) = (kwargs.get("indent")?, kwargs.get("ensure_ascii")?);
    kwargs.assert_all_used()?;
    if indent.is_some_and(|n| n > 100) {
        return Err(invalid("tojson: an indent of more than 100 blanks"));
    }
    let mut out = Vec::new();
    let written = match indent {
        None => value.serialize(&mut Serializer::with_formatter(&mut out, Spaced)),
        Some(n) => {
            let spaces = " ".repeat(n);
            let formatter = PrettyFormatter::with_indent(spaces.as_bytes());
            value.serialize(&mut Serializer::with_formatter(&mut out, formatter))
        }
    };
    written.map_err(|e| Error::new(ErrorKind::InvalidOperation, e.to_string()))?;
    let text = String::from_utf8(out).map_err(|e| Error::new(ErrorKind::InvalidOperation, e.to_string()))?;
    if ascii != Some(true) {
        return Ok(text);
    }
    let mut escaped = String::new();
    for c in text.chars() {
        match c.is_ascii() {
            true => escaped.push(c),
            false => {
                c.encode_utf16(&mut [0; 2]).iter().for_each(|u| escaped.push_str(&format!("\\u{u:04x}")))
            }
        }
    }
    Ok(escaped)
}

/// One line, a space after commas and colons.
struct Spaced;

impl Formatter for Spaced {
    fn write_f64<W: ?Sized + std::io::Write>(&mut self, w: &mut W, value: f64) -> std::io::Result<()> {
        w.write_all(python_float(value).as_bytes())
    }

    fn begin_array_value<W: ?Sized + std::io::Write>(
        &mut self,
        w: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first { Ok(()) } else { w.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(
        &mut self,
        w: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first { Ok(()) } else { w.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, w: &mut W) -> std::io::Result<()> {
        w.write_all(b": ")
    }
}
