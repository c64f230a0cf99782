//! KeyDiff: keys that differ from the others are kept.
//!
//! The formula is `extract`'s, which has it as a channel.

use pkv_extract::key_diff_of;
use pkv_recipe::MethodName;

use super::method::{Method, Needs, Ready};

pub const METHOD: Method = Method {
    name: MethodName::of("keydiff"),
    meaning: "how dissimilar a key is to the mean key of its head; uses no attention",
    needs: Needs::PREFILL,
    #[cfg(test)]
    held_by: ("tests/goldens/make_goldens.py", "\"keydiff\""),
    start: |_| {
        Ready::scores(|view| {
            let (cache, prefix) = view.prefilled()?;
            key_diff_of(cache, prefix)
        })
        .start()
    },
};
