//! Chat templates: what stands before a user's text, and between it and the model's answer.
//!
//! Templates are Jinja programs that come with a checkpoint. They are rendered with the extensions
//! that transformers gives them; sandboxing is minijinja's: a template reads its variables only.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use minijinja::value::{Kwargs, Value as Jinja};
use minijinja::{Environment, Error, ErrorKind, context};
use pkv_core::hinted;
use serde::Serialize;
use serde_json::Value;
use serde_json::ser::{Formatter, PrettyFormatter, Serializer};

/// Stands for the user's text while a template is rendered; no real text holds this character.
const MARK: &str = "\u{1}";

/// The special tokens that templates may name.
const SPECIAL: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// The text around a user's message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Frame {
    /// Before the user's text, system prompt included.
    pub prefix: String,
    /// After it, up to where the model's answer begins.
    pub switch: String,
    /// Between the model's answer and the user's next text; none if the template cannot render a conversation.
    pub turn: Option<String>,
}

impl Frame {
    /// Render the chat template in `folder`; without one, nothing before and a line break after.
    ///
    /// # Errors
    /// The template cannot be parsed or rendered, or drops the user's text.
    pub fn of_folder(folder: &Path, tokenizer_config: &Value) -> Result<Self> {
        let Some(template) = source(folder, tokenizer_config)? else {
            let turn = Some("\n\n".to_owned());
            return Ok(Self { prefix: String::new(), switch: "\n".to_owned(), turn });
        };
        let text = render(&template, tokenizer_config, &["user"]).with_context(|| {
            hinted(
                format!("rendering the chat template of `{}`", folder.display()),
                "put a corrected template into `chat_template.jinja` in the model's folder; it takes precedence",
            )
        })?;
        let (prefix, switch) = text.split_once(MARK).with_context(|| {
            hinted(
                format!("the chat template of `{}` leaves out the user's message", folder.display()),
                "the template must render a conversation of one user message",
            )
        })?;
        // Some templates take no answers, or drop them; then there are no conversations.
        let conversation =
            render(&template, tokenizer_config, &["user", "assistant", "user"]).unwrap_or_default();
        let pieces: Vec<&str> = conversation.split(MARK).collect();
        let turn = if pieces.len() == 4 { Some(pieces[2].to_owned()) } else { None };
        Ok(Self { prefix: prefix.to_owned(), switch: switch.to_owned(), turn })
    }
}

/// The template's text: its own file first, as newer exports have it, then `tokenizer_config.json`.
fn source(folder: &Path, tokenizer_config: &Value) -> Result<Option<String>> {
    let read = |name: &str| -> Result<Option<String>> {
        let path = folder.join(name);
        if !path.exists() {
            return Ok(None);
        }
        fs::read_to_string(&path).map(Some).with_context(|| format!("reading `{}`", path.display()))
    };
    if let Some(text) = read("chat_template.jinja")? {
        return Ok(Some(text));
    }
    if let Some(text) = read("chat_template.json")? {
        let json: Value = serde_json::from_str(&text)
            .with_context(|| format!("parsing `{}`", folder.join("chat_template.json").display()))?;
        return Ok(json.get("chat_template").and_then(named_default));
    }
    Ok(tokenizer_config.get("chat_template").and_then(named_default))
}

/// A template, or the one called `default` of a list of them.
fn named_default(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Array(items) => items
            .iter()
            .find(|item| item.get("name").and_then(Value::as_str) == Some("default"))
            .and_then(|item| item.get("template")?.as_str().map(str::to_owned)),
        _ => None,
    }
}

/// A special token is written as text or as an object that holds it.
pub(crate) fn token_text(value: &Value) -> Option<&str> {
    value.as_str().or_else(|| value.get("content")?.as_str())
}

/// Messages of `roles`, ready for the answer, without a reasoning section where a model has one.
fn render(template: &str, tokenizer_config: &Value, roles: &[&str]) -> Result<String> {
    let mut env = Environment::new();
    // As transformers sets up Jinja.
    env.set_trim_blocks(true);
    env.set_lstrip_blocks(true);
    env.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    env.add_function("raise_exception", raise_exception);
    env.add_function("strftime_now", strftime_now);
    env.add_filter("tojson", tojson);
    for name in SPECIAL {
        if let Some(text) = tokenizer_config.get(name).and_then(token_text) {
            env.add_global(name, text);
        }
    }
    env.add_template("chat", template)?;
    let messages: Vec<Jinja> = roles.iter().map(|role| context! { role => role, content => MARK }).collect();
    let text = env.get_template("chat")?.render(context! {
        messages => messages,
        add_generation_prompt => true,
        enable_thinking => false,
        tools => (),
        documents => (),
    })?;
    ensure!(text.matches(MARK).count() <= roles.len(), "it repeats the user's message");
    Ok(text)
}

fn raise_exception(message: String) -> Result<Jinja, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message))
}

/// Today's date for templates that state it: always 26 July 2024.
///
/// The prefix is part of every label. Were it the day on which a stage runs, labels and the cache
/// they are used on would differ from one day to the next. Llama 3.1's and 3.2's templates fall
/// back to this date themselves.
fn strftime_now(format: &str) -> Result<String, Error> {
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
            Some('H' | 'M' | 'S') if bare => "0",
            Some('H' | 'M' | 'S') => "00",
            Some('%') => "%",
            other => {
                let text = format!("strftime_now: `%{}` is not supported", other.unwrap_or(' '));
                return Err(Error::new(ErrorKind::InvalidOperation, text));
            }
        });
    }
    Ok(out)
}

/// JSON as Python's `json.dumps(value, ensure_ascii=False, indent=indent)` writes it.
fn tojson(value: Jinja, kwargs: Kwargs) -> Result<String, Error> {
    let indent: Option<usize> = kwargs.get("indent")?;
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
    String::from_utf8(out).map_err(|e| Error::new(ErrorKind::InvalidOperation, e.to_string()))
}

/// One line, a space behind commas and colons.
struct Spaced;

impl Formatter for Spaced {
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

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn rendered(template: &str) -> String {
        let config = json!({"bos_token": {"content": "<s>"}, "eos_token": "</s>", "unk_token": null});
        render(template, &config, &["user"]).unwrap()
    }

    #[test]
    fn a_conversation_shows_what_stands_between_answer_and_question() {
        let dir = tempfile::tempdir().unwrap();
        let frame = |template: &str| {
            fs::write(dir.path().join("chat_template.jinja"), template).unwrap();
            Frame::of_folder(dir.path(), &Value::Null).unwrap()
        };
        let body = "{% for m in messages %}[{{ m.role }}]{{ m.content }}</t>{% endfor %}[assistant]";
        let f = frame(body);
        assert_eq!((f.prefix.as_str(), f.switch.as_str()), ("[user]", "</t>[assistant]"));
        assert_eq!(f.turn.as_deref(), Some("</t>[user]"));
        let single =
            format!("{{% if messages|length > 1 %}}{{{{ raise_exception('one only') }}}}{{% endif %}}{body}");
        assert_eq!(frame(&single).turn, None);
    }

    #[test]
    fn special_tokens_are_text_or_objects() {
        assert_eq!(
            rendered("{{ bos_token }}{{ messages[0].content }}{{ eos_token }}{{ unk_token }}"),
            "<s>\u{1}</s>"
        );
    }

    #[test]
    fn python_methods_and_slices_work() {
        let template = "\
{%- set ns = namespace(last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if message.content is string and not(message.content.startswith('<x>') and message.content.endswith('</x>')) %}
        {%- set ns.last = index %}
        {%- break %}
    {%- endif %}
{%- endfor %}
{{- ns.last ~ 'a<b>c'.split('<b>')[-1].lstrip('\\n') }}
{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>' }}{% endif %}
{{- messages[0]['role'].upper() }}
{%- if tools is not none %}{{ raise_exception('no tools were given') }}{% endif %}
{{- messages[0]['content'] | trim }}";
        assert_eq!(rendered(template), "0c<think>\n\n</think>USER\u{1}");
    }

    #[test]
    fn blocks_leave_no_lines_behind() {
        assert_eq!(
            rendered(
                "{% if true %}\n  {% if true %}\n{{ messages[0].content }}\n  {% endif %}\n{% endif %}\n"
            ),
            "\u{1}\n"
        );
    }

    #[test]
    fn dates_do_not_depend_on_the_day() {
        assert_eq!(
            rendered("{{ strftime_now('%d %b %Y') }} {{ strftime_now('%-m/%y %A') }}"),
            "26 Jul 2024 7/24 Friday"
        );
    }

    #[test]
    fn json_is_spaced_as_python_does() {
        let template = "{{ {'a': [1, 'ü<'], 'b': none} | tojson }}{{ [1] | tojson(indent=2) }}";
        assert_eq!(rendered(template), "{\"a\": [1, \"ü<\"], \"b\": null}[\n  1\n]");
    }

    #[test]
    fn a_template_may_refuse() {
        let error =
            render("{{ raise_exception('only system messages') }}", &json!({}), &["user"]).unwrap_err();
        assert!(format!("{error:#}").contains("only system messages"), "{error:#}");
    }
}
