//! Filters with the arguments and results of Jinja's, where minijinja's take fewer or differ.
//!
//! The size of results is limited by `limits`.

use minijinja::value::{Kwargs, Value as Jinja, ValueKind};
use minijinja::{Environment, Error};

use super::limits::{add, sized, text_of, text_room};
use super::python::{self, invalid};

/// Those that are done here.
pub(super) const OWN: [&str; 14] = [
    "attr",
    "center",
    "count",
    "float",
    "indent",
    "int",
    "join",
    "length",
    "max",
    "min",
    "replace",
    "sum",
    "truncate",
    "wordcount",
];

/// Those of minijinja that take by name alone what Jinja's take in this order too.
const BY_NAME: [(&str, [&str; 3]); 4] = [
    ("dictsort", ["case_sensitive", "by", "reverse"]),
    ("groupby", ["attribute", "default", "case_sensitive"]),
    ("sort", ["reverse", "case_sensitive", "attribute"]),
    ("unique", ["case_sensitive", "attribute", ""]),
];

/// Values given in the order of `names` or by name, as Python binds them.
///
/// # Errors
/// There are more, a name is unknown, or a value is given twice.
pub(super) fn bind<const N: usize>(
    what: &str,
    args: &[Jinja],
    names: [&str; N],
) -> Result<[Option<Jinja>; N], Error> {
    let (given, named) = match args.split_last() {
        Some((last, rest)) if last.is_kwargs() => (rest, Some(Kwargs::try_from(last.clone())?)),
        _ => (args, None),
    };
    if given.len() > N {
        return Err(invalid(format!("{what}: too many arguments")));
    }
    let mut bound = std::array::from_fn(|i| given.get(i).cloned());
    let Some(named) = named else { return Ok(bound) };
    for (value, name) in bound.iter_mut().zip(names).filter(|(_, name)| named.has(name)) {
        if value.replace(named.get(name)?).is_some() {
            return Err(invalid(format!("{what}: `{name}` is given twice")));
        }
    }
    named.assert_all_used()?;
    Ok(bound)
}

/// What the filter `name` makes of `args`, the value first; `plain` has minijinja's own.
pub(super) fn apply(plain: &Environment, name: &str, args: &[Jinja]) -> Result<Jinja, Error> {
    let (value, rest) = args.split_first().ok_or_else(|| invalid(format!("{name}: no value")))?;
    let call = |filter: &str, value: &Jinja, named: &[(&str, Option<Jinja>)]| {
        let given = named.iter().filter_map(|(name, value)| Some((*name, value.clone()?)));
        let named = Jinja::from(Kwargs::from_iter(given.collect::<Vec<_>>()));
        plain.empty_state().apply_filter(filter, &[value.clone(), named])
    };
    // The attribute of each item instead of the item.
    let of_items = |attribute: Option<Jinja>| match attribute {
        Some(attribute) => call("map", value, &[("attribute", Some(attribute))]),
        None => Ok(value.clone()),
    };
    let text = || text_of(&[value]);
    let whole = |number: Option<Jinja>, default: i64| match number {
        Some(number) => i64::try_from(number),
        None => Ok(default),
    };
    let is_on = |flag: Option<Jinja>| flag.is_some_and(|flag| flag.is_true());
    Ok(match name {
        // An attribute is none of a dict's items.
        "attr" if value.kind() == ValueKind::Map => Jinja::UNDEFINED,
        "length" | "count" if value.is_undefined() => Jinja::from(0),
        "count" => plain.empty_state().apply_filter("length", args)?,
        "attr" | "length" => plain.empty_state().apply_filter(name, args)?,
        "join" => {
            let [separator, attribute] = bind(name, rest, ["d", "attribute"])?;
            let (items, separator) = (of_items(attribute)?, separator.unwrap_or_else(|| Jinja::from("")));
            let items: Vec<Jinja> = sized(items)?.try_iter()?.collect();
            let mut parts: Vec<&Jinja> = items.iter().flat_map(|item| [&separator, item]).collect();
            parts.drain(..parts.len().min(1));
            Jinja::from(text_of(&parts)?)
        }
        "sum" => {
            let [attribute, start] = bind(name, rest, ["attribute", "start"])?;
            let start = start.unwrap_or_else(|| Jinja::from(0));
            of_items(attribute)?.try_iter()?.try_fold(start, |sum, item| add(plain, sum, item))?
        }
        "min" | "max" => {
            let [case, attribute] = bind(name, rest, ["case_sensitive", "attribute"])?;
            // What is nested in it is compared.
            text()?;
            let reverse = Some(Jinja::from(name == "max"));
            let by = [("case_sensitive", case), ("attribute", attribute), ("reverse", reverse)];
            call("sort", value, &by)?.try_iter()?.next().unwrap_or(Jinja::UNDEFINED)
        }
        "int" => {
            let [default, base] = bind(name, rest, ["default", "base"])?;
            int(value, whole(base, 10)?)?.unwrap_or_else(|| default.unwrap_or_else(|| Jinja::from(0)))
        }
        "float" => {
            let [default] = bind(name, rest, ["default"])?;
            let float = match value.as_str() {
                Some(text) => text.trim().parse().ok(),
                None => f64::try_from(value.clone()).ok(),
            };
            float.map_or_else(|| default.unwrap_or_else(|| Jinja::from(0.0)), Jinja::from)
        }
        "replace" => {
            let [old, new, count] = bind(name, rest, ["old", "new", "count"])?;
            let (Some(old), Some(new)) = (old, new) else {
                return Err(invalid("replace: two texts are needed"));
            };
            let count = usize::try_from(whole(count.filter(|n| !n.is_none()), -1)?).unwrap_or(usize::MAX);
            let (text, old, new) = (text()?, text_of(&[&old])?, text_of(&[&new])?);
            text_room(text.len() + text.matches(&old).take(count).count() * new.len())?;
            Jinja::from(text.replacen(&old, &new, count))
        }
        "indent" => {
            let [width, first, blank] = bind(name, rest, ["width", "first", "blank"])?;
            let by = match width {
                Some(width) if width.as_str().is_some() => text_of(&[&width])?,
                width => {
                    let width = usize::try_from(whole(width, 4)?).unwrap_or(0);
                    text_room(width)?;
                    " ".repeat(width)
                }
            };
            let (first, blank, text) = (is_on(first), is_on(blank), text()?);
            text_room(text.len() + (text.matches('\n').count() + 1) * by.len())?;
            let lines = text.split('\n').enumerate().map(|(i, line)| {
                let indented = if i == 0 { first } else { blank || !line.is_empty() };
                if indented { format!("{by}{line}") } else { line.to_owned() }
            });
            Jinja::from(lines.collect::<Vec<_>>().join("\n"))
        }
        "truncate" => {
            let [length, cut, end, leeway] = bind(name, rest, ["length", "killwords", "end", "leeway"])?;
            let (text, end) = (text()?, end.map_or_else(|| Ok("...".to_owned()), |end| text_of(&[&end]))?);
            let (length, letters) = (whole(length, 255)?, text.chars().count() as i64);
            if letters <= length.saturating_add(whole(leeway, 5)?) {
                return Ok(Jinja::from(text));
            }
            let room = usize::try_from(length - end.chars().count() as i64)
                .map_err(|_| invalid("truncate: no room for the end"))?;
            let kept: String = text.chars().take(room).collect();
            let kept =
                if is_on(cut) { &kept } else { kept.rsplit_once(' ').map_or(&*kept, |(words, _)| words) };
            Jinja::from(format!("{kept}{end}"))
        }
        "wordcount" => {
            let text = text()?;
            let words =
                text.split(|c: char| !c.is_alphanumeric() && c != '_').filter(|word| !word.is_empty());
            Jinja::from(words.count())
        }
        "center" => {
            let [width] = bind(name, rest, ["width"])?;
            let width = usize::try_from(whole(width, 80)?).unwrap_or(0);
            text_room(width)?;
            python::padded("center", &text()?, width, " ")
        }
        _ => match BY_NAME.iter().find(|(filter, _)| *filter == name) {
            Some((_, names)) => {
                let values = bind(name, rest, *names)?;
                call(name, value, &names.iter().copied().zip(values).collect::<Vec<_>>())?
            }
            None => plain.empty_state().apply_filter(name, args)?,
        },
    })
}

/// The whole number that Python's `int` reads, else that of its `float`.
fn int(value: &Jinja, base: i64) -> Result<Option<Jinja>, Error> {
    let Some(text) = value.as_str() else {
        if value.is_undefined() {
            return Err(invalid("int: the value is undefined"));
        }
        let float = f64::try_from(value.clone()).ok().filter(|float| float.is_finite());
        return Ok(match value.kind() {
            ValueKind::Bool => Some(Jinja::from(i32::from(value.is_true()))),
            _ if value.is_integer() => Some(value.clone()),
            _ => float.map(|float| Jinja::from(float as i128)),
        });
    };
    let text = text.trim().replace('_', "").to_lowercase();
    let (sign, digits) = match text.strip_prefix('-') {
        Some(digits) => ("-", digits),
        None => ("", text.strip_prefix('+').unwrap_or(&text)),
    };
    let (prefix, base) = match base {
        2 => ("0b", 2),
        8 => ("0o", 8),
        16 => ("0x", 16),
        3..=36 => ("", base as u32),
        _ => return Err(invalid("int: the base is not between 2 and 36")),
    };
    let digits = digits.strip_prefix(prefix).unwrap_or(digits);
    Ok(match i128::from_str_radix(&format!("{sign}{digits}"), base) {
        Ok(whole) => Some(Jinja::from(whole)),
        Err(_) => text.parse().ok().filter(|f: &f64| f.is_finite()).map(|f| Jinja::from(f as i128)),
    })
}

/// `dict(...)`: a dict or pairs, then what is given by name.
pub(super) fn dict(args: &[Jinja]) -> Result<Jinja, Error> {
    let mut pairs: Vec<(Jinja, Jinja)> = Vec::new();
    for arg in args {
        for item in arg.try_iter()? {
            let pair = match arg.kind() {
                ValueKind::Map => (item.clone(), arg.get_item(&item)?),
                _ => (item.get_item_by_index(0)?, item.get_item_by_index(1)?),
            };
            pairs.push(pair);
        }
    }
    Ok(pairs.into_iter().collect())
}
