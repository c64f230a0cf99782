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
    let template = with_generation(&template)?;
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

/// `{% generation %}`, which transformers puts around what a model is trained on: a scope of its own, nothing
/// else.
fn with_generation(template: &str) -> Result<String> {
    let tokens: Vec<_> = tokenize(template, false, SyntaxConfig, BLANKS).collect::<Result<_, _>>()?;
    let (mut out, mut done) = (String::with_capacity(template.len()), 0);
    for window in tokens.windows(3) {
        let [(Token::BlockStart, _), (Token::Ident(tag), span), (Token::BlockEnd, _)] = window else {
            continue;
        };
        let ours = match *tag {
            "generation" => "with",
            "endgeneration" => "endwith",
            _ => continue,
        };
        out.push_str(&template[done..span.start_offset as usize]);
        out.push_str(ours);
        done = span.end_offset as usize;
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
        ] {
            assert_eq!(rendered(template), text, "{template}");
        }
    }

    #[test]
    fn a_template_may_refuse() {
        let error = refused("{{ raise_exception('only system messages') }}");
        assert!(error.contains("only system messages"), "{error}");
    }
}
