//! One template rendered as transformers' Jinja renders it, within limits of work and size.
//!
//! Templates are programs that come with a checkpoint. Sandboxing is minijinja's: a template reads its
//! variables only. `python` has what they expect of Python, `limits` what stops them.

use std::sync::mpsc::RecvTimeoutError;

use anyhow::{Context, Result, anyhow, bail, ensure};
use minijinja::machinery::{
    CodeGenerator, Instruction, Instructions, Token, Vm, WhitespaceConfig, make_string_output, parse,
    tokenize,
};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::Value as Jinja;
use minijinja::{AutoEscape, Environment, context};
use minijinja_contrib::globals::{cycler, joiner};
use pkv_core::hinted;

use super::limits::{self, ADD, CONCAT, MUL, REM};
use super::python;
use crate::tokenizer::SpecialTokens;

/// Placeholder of the user's text while a template is rendered; no real text holds this character.
pub(super) const MARK: &str = "\u{1}";

/// As transformers sets up Jinja.
const BLANKS: WhitespaceConfig =
    WhitespaceConfig { keep_trailing_newline: false, lstrip_blocks: true, trim_blocks: true };

/// Messages of `roles`, ready for the answer, without a reasoning section where a model has one.
///
/// # Errors
/// The template is malformed, refuses these messages, or goes beyond `limits`.
pub(super) fn render(template: &str, special: &SpecialTokens, roles: &[&str]) -> Result<String> {
    ensure!(
        template.len() <= limits::SOURCE_BYTES,
        hinted(
            format!("it has {} bytes, at most {} are rendered", template.len(), limits::SOURCE_BYTES),
            "real templates have less than 50,000 bytes; put the model's own into `chat_template.jinja`"
        )
    );
    // Long chains of operators and nested values go deep into the stack; pages that are not touched cost
    // nothing.
    let (send, receive) = std::sync::mpsc::channel();
    let (template, variables) = (template.to_owned(), special.texts().collect::<Vec<_>>());
    let roles: Vec<String> = roles.iter().map(|role| (*role).to_owned()).collect();
    let work = move || {
        let result = render_here(&template, variables, &roles);
        // As text: minijinja's errors hold values, which may be nested too deep for the stack of another
        // thread.
        drop(send.send(result.map_err(|e| anyhow!("{e:#}"))));
    };
    std::thread::Builder::new()
        .stack_size(limits::STACK_BYTES)
        .spawn(work)
        .context("starting a thread for it")?;
    match receive.recv_timeout(limits::TIME) {
        Ok(result) => result,
        // One operation cannot be interrupted; the thread ends with the process.
        Err(RecvTimeoutError::Timeout) => bail!("it takes more than {} s", limits::TIME.as_secs()),
        Err(RecvTimeoutError::Disconnected) => bail!("it made the renderer fail"),
    }
}

fn render_here(template: &str, special: Vec<(String, String)>, roles: &[String]) -> Result<String> {
    // Jinja takes all line ends for `\n`, in texts within the template too.
    let template = template.replace("\r\n", "\n").replace('\r', "\n");
    let template = as_minijinja(&template)?;
    limits::check_literals(&template, BLANKS)?;

    let tree = parse(&template, "chat", SyntaxConfig, BLANKS)?;
    let mut generator = CodeGenerator::new("chat", &template);
    generator.compile_stmt(&tree);
    let (mut program, mut blocks) = generator.finish();
    let longest = [&mut program].into_iter().chain(blocks.values_mut()).map(guard).max().unwrap_or(0);

    let mut env = Environment::new();
    limits::install(&mut env, longest);
    env.add_function("raise_exception", python::raise_exception);
    env.add_function("strftime_now", python::strftime_now);
    env.add_function("cycler", cycler);
    env.add_function("joiner", joiner);

    let messages: Vec<Jinja> = roles.iter().map(|role| context! { role => role, content => MARK }).collect();
    let variables = context! {
        messages => messages,
        add_generation_prompt => true,
        enable_thinking => false,
        tools => (),
        documents => (),
        ..Jinja::from_iter(special)
    };
    let mut text = String::new();
    let mut out = make_string_output(&mut text);
    Vm::new(&env).eval(&program, variables, &blocks, &mut out, AutoEscape::None)?;
    ensure!(text.matches(MARK).count() <= roles.len(), "it repeats the user's message");
    // `tojson` escapes the mark.
    ensure!(!text.contains("\\u0001"), "it writes the user's message as JSON");
    Ok(text)
}

/// The template with what minijinja reads otherwise replaced: `{% generation %}`, which transformers puts
/// around what a model is trained on, is a scope of its own, nothing else; escapes within texts are Python's.
fn as_minijinja(template: &str) -> Result<String> {
    let tokens: Vec<_> = tokenize(template, false, SyntaxConfig, BLANKS).collect::<Result<_, _>>()?;
    let (mut out, mut done) = (String::with_capacity(template.len()), 0);
    for (i, (token, span)) in tokens.iter().enumerate() {
        let (start, end) = (span.start_offset as usize, span.end_offset as usize);
        let around = [i.checked_sub(1), Some(i + 1)].map(|at| at.and_then(|at| Some(&tokens.get(at)?.0)));
        let ours = match (token, around) {
            (Token::String(_), _) => {
                let text = python::unescaped(&template[start + 1..end - 1])?;
                format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""))
            }
            (Token::Ident("generation"), [Some(Token::BlockStart), Some(Token::BlockEnd)]) => {
                "with".to_owned()
            }
            (Token::Ident("endgeneration"), [Some(Token::BlockStart), Some(Token::BlockEnd)]) => {
                "endwith".to_owned()
            }
            _ => continue,
        };
        out.push_str(&template[done..start]);
        out.push_str(&ours);
        done = end;
    }
    out.push_str(&template[done..]);
    Ok(out)
}

/// Have the operations that make texts and lists grow done by `limits`; the length of the longest literal
/// text.
fn guard(program: &mut Instructions) -> usize {
    let mut longest = 0;
    for at in 0.. {
        let Some(instruction) = program.get_mut(at) else { break };
        let by = match instruction {
            Instruction::Add => ADD,
            Instruction::StringConcat => CONCAT,
            Instruction::Mul => MUL,
            Instruction::Rem => REM,
            Instruction::EmitRaw(text) => {
                longest = longest.max(text.len());
                continue;
            }
            _ => continue,
        };
        // Both take two values from the stack and leave one.
        *instruction = Instruction::CallFunction(by, Some(2));
    }
    longest
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(template: &str) -> String {
        format!("{:#}", render(template, &SpecialTokens::default(), &["user"]).unwrap_err())
    }

    fn rendered(template: &str) -> String {
        let special = SpecialTokens::of_texts(&[("bos_token", "<s>"), ("eos_token", "</s>")]);
        render(template, &special, &["user"]).unwrap()
    }

    #[test]
    fn special_tokens_are_texts() {
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
    fn blocks_leave_no_lines() {
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
    fn json_has_the_options_that_are_known_and_never_the_message() {
        assert_eq!(rendered("{{ 'ü🦀' | tojson(ensure_ascii=true) }}"), "\"\\u00fc\\ud83e\\udd80\"");
        assert_eq!(rendered("{{ [1.0, 1e-7, 1e20] | tojson }}"), "[1.0, 1e-07, 1e+20]");
        assert!(refused("{{ {'a': 1} | tojson(sort_keys=true) }}").contains("sort_keys"));
        let both = "{{ messages | tojson }}{% for m in messages %}{{ m.content }}{% endfor %}";
        assert!(refused(both).contains("writes the user's message as JSON"));
    }

    #[test]
    fn numbers_and_tests_are_pythons() {
        let numbers = "{{ 1e20 }} {{ 1.5e16 }} {{ 1e15 }} {{ 0.0001 }} {{ 1e-5 }} {{ [0.1, 1e16] }} {% set x = 1e-300 %}{{ 'a' ~ x }}";
        assert_eq!(rendered(numbers), "1e+20 1.5e+16 1000000000000000.0 0.0001 1e-05 [0.1, 1e+16] a1e-300");
        let tests = "{{ 'a' is sequence }}{{ {} is sequence }}{{ 1 is sequence }}{{ true is number }}{{ 'a' is number }}";
        assert_eq!(rendered(tests), "TrueTrueFalseTrueFalse");
        let tests = "{{ none is iterable }}{{ 'a' is iterable }}{{ [] is iterable }}{{ nothing is iterable }}{{ 1 is iterable }}";
        assert_eq!(rendered(tests), "FalseTrueTrueTrueFalse");
        assert_eq!(rendered("{% if tools is iterable and tools | length > 0 %}tools{% endif %}-"), "-");
    }

    /// Rendered by transformers 5.24 (Jinja 3.1.6).
    #[test]
    fn values_in_texts_and_rounded_ones_are_pythons() {
        for (template, text) in [
            (
                "{{ '%s %s' % ('a', ['b']) }}{{ '%s' % {'a': 1} }}{{ '%s|%s' % (none, true) }}",
                "a ['b']{'a': 1}None|True",
            ),
            ("{{ \"they're bill's-own (x)\" | title }}", "They're Bill's-Own (X)"),
            ("{{ 2.5 | round }} {{ 3.5 | round }} {{ 2.567 | round(1) }} {{ 7 | round }}", "2.0 4.0 2.6 7"),
            ("{{ {'a': [1, none]} | pprint }}{{ ['\\x7f'] }}", "{'a': [1, None]}['\\x7f']"),
            // Escapes within texts.
            (
                r"{{ '\101\x41\u2581\U0001F600\a' | length }}{{ '\101\u2581\U0001F600\ud83d\ude00' }}",
                "5A\u{2581}😀😀",
            ),
            (r#"{{ 'it\'s \d "q" \\n' }}{{ "a\"\n" }}"#, "it's \\d \"q\" \\na\"\n"),
            ("{{ 'a\\\nb' }}{{ 'generation' }}", "abgeneration"),
            // Arguments by position and by name.
            (
                "{{ ['a', none, 1.0] | join(d='-') }}{{ messages | join(', ', attribute='role') }}",
                "a-None-1.0user",
            ),
            ("{{ [['a', 1], {'b': none}] | join(' ') }}{{ [] | join('x') }}", "['a', 1] {'b': None}"),
            ("{{ [{'a': 1}, {'a': 5}] | sum(attribute='a') }}{{ [[1], [2]] | sum(start=[]) }}", "6[1, 2]"),
            ("{{ ['b', 'A', 'a'] | min }}{{ ['b', 'C'] | max }}{{ [3, 1] | min }}{{ [] | max }}", "AC1"),
            ("{{ ([{'a': 1}, {'a': 3}] | max(attribute='a')).a }}{{ ['b', 'A'] | min(true) }}", "3A"),
            (
                "{{ 'x' | int }}{{ 'x' | int(7) }}{{ '0x1f' | int(base=16) }}{{ ' -3.7 ' | int }}{{ none | int }}",
                "0731-30",
            ),
            ("{{ '3.5' | float }} {{ 'x' | float }} {{ 'x' | float(default=1) }}", "3.5 0.0 1"),
            (
                "{{ 'aaa' | replace('a', 'b', 2) }}{{ 'aa' | replace('a', 'b', count=1) }}{{ 1 | replace(1, 2) }}",
                "bbaba2",
            ),
            (
                "{{ 'a\nb\n\nc' | indent(2) }}|{{ 'a\n\nb' | indent('>', first=True, blank=True) }}",
                "a\n  b\n\n  c|>a\n>\n>b",
            ),
            (
                "{{ [3, 1, 2] | sort(true) | join }}{{ ['b', 'A', 'a'] | sort(case_sensitive=true) | join }}",
                "321Aab",
            ),
            ("{% for k, v in {'b': 1, 'a': 2} | dictsort(false, 'value', true) %}{{ k }}{% endfor %}", "ab"),
            (
                "{{ 'hello world foo' | truncate(8) }}{{ 'hello world' | truncate(8, true, '..', 0) }}",
                "hello...hello ..",
            ),
            (
                "{{ 'a b_c, d' | wordcount }}{{ 'a' | center(5) }}|{{ nothing | length }}{{ 'ab' | count }}",
                "3  a  |02",
            ),
            (
                "{{ 'a,b'.split(sep=',') }}{{ 'a b c'.split(maxsplit=1) }}{{ 'a b c'.rsplit(maxsplit=1) }}",
                "['a', 'b']['a', 'b c']['a b', 'c']",
            ),
            (
                "{{ 'a\nb\n'.splitlines(keepends=true) }}{{ ['a', 'b'].index('b') }}{{ [1, 2, 1].count(1) }}",
                "['a\\n', 'b\\n']12",
            ),
            ("{{ \"they're\".title() }}{{ 'a1b x-y'.title() }}{{ 'aB'.swapcase() }}", "They'ReA1B X-YAb"),
            ("{{ true | int }}{{ ''.isspace() }}{{ 'A1'.isupper() }}{{ 'aB'.islower() }}", "1FalseTrueFalse"),
            ("{{ dict(a=1).a }}{{ dict([('a', 2)]).a }}{{ dict({'a': 1}, b=2) }}", "12{'a': 1, 'b': 2}"),
            ("{{ 'a' * -1 }}{{ -1 * [0] }}{{ -2 * 3 }}{{ messages[0] | attr('role') }}", "[]-6"),
        ] {
            assert_eq!(rendered(template), text, "{template}");
        }
    }

    #[test]
    fn a_template_may_refuse() {
        let error = refused("{{ raise_exception('only system messages') }}");
        assert!(error.contains("only system messages"), "{error}");
    }

    #[test]
    fn arguments_and_escapes_that_are_not_known_are_named() {
        for (template, why) in [
            ("{{ ['a'] | join('-', d='-') }}", "join: `d` is given twice"),
            ("{{ ['a'] | join(sep='-') }}", "unknown keyword argument 'sep'"),
            ("{{ 'a' | replace('a') }}", "replace: two texts are needed"),
            ("{{ 'a' | center(1, 2) }}", "center: too many arguments"),
            ("{{ nothing | int }}", "int: the value is undefined"),
            ("{{ '\\N{BULLET}' }}", "a text has an escape `\\N` that is no character"),
            ("{{ 'a\\n' | indent(9999999) }}", "it makes a text of more than"),
            ("{{ 'a\\n' | indent(width=9999999) }}", "it makes a text of more than"),
            ("{{ 'a' | center(99999999) }}", "it makes a text of more than"),
            ("{{ 'a' | center(width=99999999) }}", "it makes a text of more than"),
            ("{{ 'a' | center(1000) | replace('', 'b' | center(9000)) }}", "it makes a text of more than"),
            (
                "{{ 'a' | center(1000) | replace(old='', new='b' | center(9000)) }}",
                "it makes a text of more than",
            ),
            ("{{ range(9000) | join('a' | center(9000)) }}", "it makes a text of more than"),
        ] {
            let error = refused(template);
            assert!(error.contains(why), "{template}: {error}");
        }
    }
}
