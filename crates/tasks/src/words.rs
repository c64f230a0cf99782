//! RULER's words: the lists of the Python package wonderwords (see `words/README.md`).

/// The lists of a language, as RULER combines them.
#[derive(Clone, Debug)]
pub struct Words {
    adjectives: Vec<&'static str>,
    nouns: Vec<&'static str>,
    /// Nouns, adjectives and verbs, each once, sorted.
    pub all: Vec<&'static str>,
}

impl Words {
    pub fn built_in() -> Self {
        let list = |text: &'static str| text.lines().map(str::trim_end).collect::<Vec<_>>();
        let adjectives = list(include_str!("../words/adjectives.txt"));
        let nouns = list(include_str!("../words/nouns.txt"));
        let mut all = [&nouns[..], &adjectives[..], &list(include_str!("../words/verbs.txt"))[..]].concat();
        all.sort_unstable();
        all.dedup();
        Self { adjectives, nouns, all }
    }

    /// `adjective-noun`, any pair as likely as any other.
    pub fn pair(&self, rng: &mut pkv_core::Rng) -> String {
        format!("{}-{}", crate::draw::choose(rng, &self.adjectives), crate::draw::choose(rng, &self.nouns))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_whole() {
        let words = Words::built_in();
        assert_eq!((words.adjectives.len(), words.nouns.len()), (912, 6782));
        // Python: len(set(nouns + adjectives + verbs)).
        assert_eq!(words.all.len(), ALL);
        assert!(words.all.windows(2).all(|w| w[0] < w[1]));
    }

    const ALL: usize = 8166;
}
