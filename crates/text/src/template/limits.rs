//! Limits of a chat template: instructions, and the size of the texts and lists that it makes.
//!
//! minijinja counts instructions, but a few of them can double a text until memory is full. So the operators
//! and filters that make values larger are done here: each looks at the size of its result first.

use std::fmt::{self, Write};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, ensure};
use minijinja::machinery::{Token, WhitespaceConfig, tokenize};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Rest, Value as Jinja, ValueKind};
use minijinja::{Environment, Error, State, context};

use super::filters;
use super::python::{self, invalid};

/// Templates of known models have up to 40 kB.
pub(super) const SOURCE_BYTES: usize = 256 << 10;
/// The longest text that a template may make, and the longest list.
const TEXT_BYTES: usize = 1 << 20;
const LIST_ITEMS: usize = 1 << 16;
/// A conversation of three messages takes some thousand.
const INSTRUCTIONS: usize = 500_000;
/// All literal text that loops may put out.
const LITERAL_BYTES: usize = 1 << 30;
/// Rendering takes milliseconds; a busy machine may need longer.
pub(super) const TIME: Duration = Duration::from_secs(30);
pub(super) const STACK_BYTES: usize = 256 << 20;

/// Functions that stand for operators; no template can name or replace them.
pub(super) const ADD: &str = "\u{1}+";
pub(super) const CONCAT: &str = "\u{1}~";
pub(super) const MUL: &str = "\u{1}*";
pub(super) const REM: &str = "\u{1}%";

/// Filters whose result can be larger than their input, or that look at all that is nested in it.
const SIZED: [&str; 11] =
    ["batch", "dictsort", "e", "escape", "format", "groupby", "list", "slice", "sort", "string", "unique"];

/// Bound the work of `env` and the size of what it makes. `literal` is the length of the longest literal
/// text.
pub(super) fn install(env: &mut Environment<'static>, literal: usize) {
    env.set_fuel(Some(INSTRUCTIONS.min(LITERAL_BYTES / literal.max(1)) as u64));
    // The same operations as they are without limits.
    let plain = Arc::new(Environment::new());
    for (name, operator) in [(ADD, "a + b"), (MUL, "a * b"), (REM, "a % b")] {
        let plain = Arc::clone(&plain);
        env.add_function(name, move |a: Jinja, b: Jinja| operate(&plain, operator, a, b));
    }
    env.add_function(CONCAT, |a: Jinja, b: Jinja| text_of(&[&a, &b]).map(Jinja::from));
    for name in filters::OWN {
        let plain = Arc::clone(&plain);
        env.add_filter(name, move |args: Rest<Jinja>| filters::apply(&plain, name, &args));
    }
    for name in SIZED {
        let plain = Arc::clone(&plain);
        env.add_filter(name, move |args: Rest<Jinja>| {
            check_call(name, &args)?;
            match name {
                "string" => text_of(&[args.first().unwrap_or(&Jinja::UNDEFINED)]).map(Jinja::from),
                _ => filters::apply(&plain, name, &args),
            }
        });
    }
    env.add_function("dict", |args: Rest<Jinja>| filters::dict(&args));
    env.add_filter("tojson", |value: Jinja, kwargs: Kwargs| {
        check_call("tojson", std::slice::from_ref(&value))?;
        python::tojson(value, kwargs)
    });
    env.add_filter("title", |text: String| python::title(&text));
    env.add_filter("round", |value: Jinja, digits: Option<i32>| python::round(value, digits));
    env.add_filter("pprint", |value: Jinja| {
        check_call("pprint", std::slice::from_ref(&value))?;
        python::pprint(&value)
    });
    env.add_test("sequence", |value: Jinja| python::is_sequence(&value));
    env.add_test("iterable", |value: Jinja| python::is_iterable(&value));
    env.add_test("number", |value: Jinja| python::is_number(&value));
    env.set_unknown_method_callback(|state: &State, value: &Jinja, name: &str, args: &[Jinja]| {
        let all: Vec<Jinja> = [std::slice::from_ref(value), args].concat();
        check_call(name, &all)?;
        python::method(state, value, name, args)
    });
    env.set_formatter(|out, _, value| {
        out.write_str(&text_of(&[value])?).map_err(|_| invalid("its output cannot be written"))
    });
}

/// A template whose literals alone make too long a text: minijinja computes with constants before it counts.
pub(super) fn check_literals(template: &str, blanks: WhitespaceConfig) -> Result<()> {
    // Of the expression that is being read: bytes of its texts, product of its numbers, whether it
    // multiplies.
    let (mut texts, mut product, mut multiplies) = (0usize, 1usize, false);
    for token in tokenize(template, false, SyntaxConfig, blanks) {
        match token?.0 {
            Token::VariableStart | Token::BlockStart => (texts, product, multiplies) = (0, 1, false),
            Token::Str(text) => texts += text.len(),
            Token::String(text) => texts += text.len(),
            Token::Int(n) => {
                product = product.saturating_mul(usize::try_from(n.max(1)).unwrap_or(usize::MAX))
            }
            Token::Mul => multiplies = true,
            Token::Pow => product = usize::MAX,
            Token::VariableEnd | Token::BlockEnd => ensure!(
                !multiplies || texts.saturating_mul(product) <= TEXT_BYTES,
                "it repeats a text: more than {TEXT_BYTES} bytes"
            ),
            _ => {}
        }
    }
    Ok(())
}

fn operate(plain: &Environment, operator: &str, a: Jinja, b: Jinja) -> Result<Jinja, Error> {
    if operator == "a % b"
        && let Some(format) = a.as_str()
    {
        check_call("format", &[a.clone(), b.clone()])?;
        return python::percent(format, &b).map(Jinja::from);
    }
    let (a, b) = (sized(a)?, sized(b)?);
    let len = |v: &Jinja| v.as_str().map(str::len).or_else(|| v.len()).unwrap_or(0);
    let grown = match operator {
        "a * b" => match (a.as_usize(), b.as_usize()) {
            (Some(n), None) => len(&b).saturating_mul(n),
            (None, Some(n)) => len(&a).saturating_mul(n),
            _ => 0,
        },
        _ => len(&a) + len(&b),
    };
    // A text or list repeated fewer than no times is empty.
    let count = |number: &Jinja, other: &Jinja| {
        !other.is_number() && i64::try_from(number.clone()).is_ok_and(|n| n < 0)
    };
    let (a, b) = match operator == "a * b" {
        true if count(&a, &b) => (Jinja::from(0), b),
        true if count(&b, &a) => (a, Jinja::from(0)),
        _ => (a, b),
    };
    let list = is_list(&a) || is_list(&b);
    room(grown, if list { LIST_ITEMS } else { TEXT_BYTES })?;
    plain.compile_expression(operator)?.eval(context! { a, b })
}

/// `a + b`.
pub(super) fn add(plain: &Environment, a: Jinja, b: Jinja) -> Result<Jinja, Error> {
    operate(plain, "a + b", a, b)
}

fn is_list(value: &Jinja) -> bool {
    matches!(value.kind(), ValueKind::Seq | ValueKind::Iterable)
}

/// A list whose length is known: joined lists of unknown length could double unseen.
pub(super) fn sized(value: Jinja) -> Result<Jinja, Error> {
    if !is_list(&value) || value.len().is_some() {
        return Ok(value);
    }
    let items: Vec<Jinja> = value.try_iter()?.take(LIST_ITEMS + 1).collect();
    room(items.len(), LIST_ITEMS)?;
    Ok(Jinja::from(items))
}

/// # Errors
/// The result of a filter or method would be too long.
fn check_call(name: &str, args: &[Jinja]) -> Result<(), Error> {
    let Some(value) = args.first() else { return Ok(()) };
    let number = |at: usize| args.get(at).and_then(Jinja::as_usize).unwrap_or(0);
    let len = |at: usize| args.get(at).and_then(Jinja::as_str).map_or(0, str::len);
    let items = |at: usize| args.get(at).and_then(Jinja::len).unwrap_or(LIST_ITEMS);
    let text = value.as_str().unwrap_or_default();
    let size = match name {
        // The separator joins the list.
        "join" => text_of(&args.iter().skip(1).collect::<Vec<_>>())?.len() + items(1) * text.len(),
        "replace" if len(1) == 0 => text.len() + (text.len() + 1) * len(2),
        "replace" => {
            text.len() + text.matches(args.get(1).and_then(Jinja::as_str).unwrap_or("\0")).count() * len(2)
        }
        "format" => {
            let widths = text.split(|c: char| !c.is_ascii_digit()).filter(|run| !run.is_empty());
            let width = widths.map(|run| run.parse().unwrap_or(usize::MAX)).max().unwrap_or(0);
            let longest = text_of(&args.iter().skip(1).collect::<Vec<_>>())?.len();
            text.matches(['%', '{'])
                .count()
                .saturating_mul(longest.saturating_add(width))
                .saturating_add(text.len())
        }
        "ljust" | "rjust" | "center" | "zfill" => number(1).saturating_mul(len(2).max(1)),
        "batch" | "slice" => return room(number(1), LIST_ITEMS),
        "list" if is_list(value) => return sized(value.clone()).map(drop),
        _ => text_of(&[value])?.len(),
    };
    room(size, TEXT_BYTES)
}

/// # Errors
/// A text of so many bytes is too long.
pub(super) fn text_room(size: usize) -> Result<(), Error> {
    room(size, TEXT_BYTES)
}

fn room(size: usize, limit: usize) -> Result<(), Error> {
    match size <= limit {
        true => Ok(()),
        false if limit == LIST_ITEMS => Err(invalid(format!("it makes a list of more than {limit} items"))),
        false => Err(invalid(format!("it makes a text of more than {limit} bytes"))),
    }
}

/// Values one after another, as Python prints them.
pub(super) fn text_of(values: &[&Jinja]) -> Result<String, Error> {
    let mut out = Bounded(String::new());
    match values.iter().try_for_each(|value| python::display(value, &mut out)) {
        Ok(()) => Ok(out.0),
        Err(_) => {
            Err(invalid(format!("it makes a text of more than {TEXT_BYTES} bytes, or one nested too deep")))
        }
    }
}

/// A text that refuses to grow beyond the limit.
struct Bounded(String);

impl Write for Bounded {
    fn write_str(&mut self, s: &str) -> fmt::Result {
        if self.0.len() + s.len() > TEXT_BYTES {
            return Err(fmt::Error);
        }
        self.0.push_str(s);
        Ok(())
    }
}
