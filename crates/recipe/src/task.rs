//! A task's name: how recipes spell what is asked of pruned caches.
//!
//! Any text is a name here. The known tasks and suites are in `pkv_eval::tasks`, which refuses other names.

use std::borrow::Cow;
use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A task, such as `facts`; a whole suite, such as `ruler`; or one task of a suite, `ruler/vt`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(transparent)]
pub struct TaskName(Cow<'static, str>);

impl TaskName {
    /// Facts planted in documents, several questions per context.
    pub const FACTS: Self = Self::of("facts");
    /// The document's continuation after the pruned context.
    pub const PERPLEXITY: Self = Self::of("perplexity");

    /// A name that the program itself spells.
    pub const fn of(name: &'static str) -> Self {
        Self(Cow::Borrowed(name))
    }

    /// A name that was read.
    pub fn new(name: &str) -> Self {
        Self(Cow::Owned(name.to_owned()))
    }

    pub fn name(&self) -> &str {
        &self.0
    }

    /// The task or suite, and the single task of a suite.
    pub fn parts(&self) -> (&str, Option<&str>) {
        self.0.split_once('/').map_or((self.name(), None), |(suite, task)| (suite, Some(task)))
    }
}

impl fmt::Display for TaskName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
