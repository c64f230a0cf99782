//! Facts into a context of a given length, where the recipe wants them.
//!
//! Used for examples and for the evaluation's contexts alike. Places are chosen by `places`, facts by
//! `facts`.

use anyhow::Result;
use pkv_core::Rng;
use pkv_recipe::FactPlace;
use pkv_shard::PlantedFact;

use crate::facts::{self, Fact, TokenizedFact};
use crate::places::{Decode, SPACINGS, draw, encode_after};
use crate::tokens::Encode;

/// Puts facts into texts of one tokenizer.
#[derive(Clone, Copy)]
pub(crate) struct Planter<'a> {
    pub place: FactPlace,
    pub encode: &'a Encode<'a>,
    pub decode: &'a Decode<'a>,
}

impl Planter<'_> {
    /// The most tokens that a fact takes, whatever its place.
    ///
    /// # Errors
    /// The tokenizer fails.
    pub fn room(&self, fact: &Fact) -> Result<usize> {
        if self.place == FactPlace::Anywhere {
            return Ok((self.encode)(&alone(fact))?.len());
        }
        let mut most = 0;
        for spacing in SPACINGS {
            most = most.max((self.encode)(&spacing.around(&fact.sentence))?.len());
        }
        Ok(most)
    }

    /// `length` tokens: the first of `text` with `facts` among them, and where each is, in order of position.
    ///
    /// `text` has at least `length` tokens less those of the facts; `length` is more than the facts' room.
    ///
    /// # Errors
    /// The tokenizer fails.
    pub fn plant(
        &self,
        rng: &mut Rng,
        text: &[u32],
        length: usize,
        facts: Vec<Fact>,
    ) -> Result<(Vec<u32>, Vec<PlantedFact>)> {
        let mut planted = Vec::with_capacity(facts.len());
        if self.place == FactPlace::Anywhere {
            for fact in facts {
                planted.push(TokenizedFact { tokens: (self.encode)(&alone(&fact))?, fact });
            }
            let body = length - planted.iter().map(|f| f.tokens.len()).sum::<usize>();
            return Ok(facts::plant(rng, &text[..body], planted));
        }
        // How many tokens a fact takes depends on its place, and how much text is left on that.
        let mut end = length;
        for fact in &facts {
            end -= self.room(fact)?;
        }
        let places = draw(rng, text, end, facts.len(), self.decode)?;
        let mut cuts = Vec::with_capacity(facts.len());
        for (fact, place) in facts.into_iter().zip(places) {
            let spelt = place.spacing.around(&fact.sentence);
            let tokens = match place.at.checked_sub(1) {
                Some(before) => encode_after(text[before], &spelt, self.encode, self.decode)?,
                None => (self.encode)(&spelt)?,
            };
            planted.push(TokenizedFact { fact, tokens });
            cuts.push(place.at);
        }
        let body = length - planted.iter().map(|f| f.tokens.len()).sum::<usize>();
        Ok(facts::insert(&text[..body], cuts, planted))
    }
}

fn alone(fact: &Fact) -> String {
    format!(" {}", fact.sentence)
}
