//! Chat templates: what precedes a user's text, and between it and the model's answer.
//!
//! `source` finds the template, `jinja` renders it.

mod filters;
mod jinja;
mod limits;
mod python;
mod source;

use std::path::Path;

use anyhow::{Context, Result};
use pkv_core::hinted;

use crate::tokenizer::SpecialTokens;
use jinja::{MARK, render};

/// The text around a user's message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Frame {
    /// Before the user's text, system prompt included.
    pub prefix: String,
    /// After it, up to where the model's answer begins.
    pub switch: String,
    /// Between the model's answer and the user's next text; none if the template cannot render a
    /// conversation.
    pub turn: Option<String>,
}

impl Frame {
    /// Render the chat template in `folder`. Without one, as a base model has none: the bos token before, if
    /// the tokenizer has one, and a line break after.
    ///
    /// That is kvpress' rule for such models (`KVPressTextGenerationPipeline.preprocess`:
    /// `bos_token + context`, question suffix `"\\n"`), whose scores ours are compared with; the bos token is
    /// the attention sink that they were trained with. Tokenizers of Qwen have no bos token: their contexts
    /// begin with the text.
    ///
    /// # Errors
    /// The template cannot be read or rendered, takes too long, or drops the user's text.
    pub fn of_folder(folder: &Path, special: &SpecialTokens) -> Result<Self> {
        let Some(template) = source::find(folder, special.config())? else {
            let turn = Some("\n\n".to_owned());
            let prefix = special.text("bos_token").unwrap_or_default().to_owned();
            return Ok(Self { prefix, switch: "\n".to_owned(), turn });
        };
        let name = format!("{} of `{}`", template.name, folder.display());
        let text = render(&template.text, special, &["user"]).with_context(|| {
            hinted(
                format!("rendering the chat template, {name}"),
                "put a corrected template into `chat_template.jinja` in the model's folder; it takes precedence",
            )
        })?;
        let (prefix, switch) = text.split_once(MARK).with_context(|| {
            hinted(
                format!("the chat template, {name}, leaves out the user's message"),
                "the template must render a conversation of one user message",
            )
        })?;
        // Some templates take no answers, or drop them; then there are no conversations.
        let conversation =
            render(&template.text, special, &["user", "assistant", "user"]).unwrap_or_default();
        let pieces: Vec<&str> = conversation.split(MARK).collect();
        let turn = if pieces.len() == 4 { Some(pieces[2].to_owned()) } else { None };
        Ok(Self { prefix: prefix.to_owned(), switch: switch.to_owned(), turn })
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_conversation_shows_what_stands_between_answer_and_question() {
        let dir = tempfile::tempdir().unwrap();
        let frame = |template: &str| {
            fs::write(dir.path().join("chat_template.jinja"), template).unwrap();
            Frame::of_folder(dir.path(), &SpecialTokens::default()).unwrap()
        };
        let body = "{% for m in messages %}[{{ m.role }}]{{ m.content }}</t>{% endfor %}[assistant]";
        let f = frame(body);
        assert_eq!((f.prefix.as_str(), f.switch.as_str()), ("[user]", "</t>[assistant]"));
        assert_eq!(f.turn.as_deref(), Some("</t>[user]"));
        let single =
            format!("{{% if messages|length > 1 %}}{{{{ raise_exception('one only') }}}}{{% endif %}}{body}");
        assert_eq!(frame(&single).turn, None);
    }
}
