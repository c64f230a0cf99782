//! Colour and marker of a method in charts and tables. Its meaning comes from the registry, which the caller
//! has.
//!
//! Colour and marker follow from a method's place in the registry, so that every report shows it alike and a
//! new method needs nothing here. Results may hold a method that this version does not know: it goes by its
//! name.

use pkv_core::Policy;
use pkv_recipe::MethodName;
use pkv_results::MethodInfo;

use crate::chart::Marker;

/// Colours of `chart.css`'s palette: `p0`, `p1` and so on. The first is the mapper's, the second KVzip's, and
/// theirs alone.
const PALETTE: usize = 16;
const MARKERS: [Marker; 6] =
    [Marker::Circle, Marker::Square, Marker::TriangleUp, Marker::Diamond, Marker::TriangleDown, Marker::Ring];

/// The methods that a report knows, in the order of tables and charts.
#[derive(Clone, Copy)]
pub struct Methods<'a>(pub &'a [MethodInfo]);

impl Methods<'_> {
    /// Those that occur, each once: in the registry's order, unknown ones last, in the order they do.
    pub fn ordered(self, occurring: impl IntoIterator<Item = MethodName>) -> Vec<MethodName> {
        let mut found: Vec<MethodName> = Vec::new();
        for method in occurring {
            if !found.contains(&method) {
                found.push(method);
            }
        }
        found.sort_by_key(|m| self.place(*m));
        found
    }

    /// The same, oracles before all others.
    pub fn oracles_first(self, occurring: impl IntoIterator<Item = MethodName>) -> Vec<MethodName> {
        let mut found = self.ordered(occurring);
        found.sort_by_key(|m| !self.is_oracle(*m));
        found
    }

    /// What is known of a method; `None` if it is of another version.
    pub fn find(&self, method: MethodName) -> Option<&MethodInfo> {
        self.0.iter().find(|m| m.name == method)
    }

    /// Index in the registry; unknown methods share the one after its end.
    fn place(self, method: MethodName) -> usize {
        self.0.iter().position(|m| m.name == method).unwrap_or(self.0.len())
    }

    /// Its meaning, in a sentence without its name.
    pub fn meaning(self, method: MethodName) -> &'static str {
        self.find(method).map_or("a method of another version of proxykv-train", |m| m.meaning)
    }

    /// Classes of `chart.css`.
    pub fn class(self, method: MethodName) -> String {
        colour(self.place(method))
    }

    /// Shapes differ where colours are near, and where a colour comes again.
    pub fn marker(self, method: MethodName) -> Marker {
        shape(self.place(method))
    }

    /// KVzip's own scores cost what the mapper avoids: they are compared with, not competed with.
    pub fn is_oracle(self, method: MethodName) -> bool {
        self.find(method).is_some_and(MethodInfo::is_oracle)
    }
}

fn colour(place: usize) -> String {
    match place {
        0..PALETTE => format!("p{place}"),
        _ => format!("p{} again", 2 + (place - PALETTE) % (PALETTE - 2)),
    }
}

fn shape(place: usize) -> Marker {
    MARKERS[place % MARKERS.len()]
}

#[cfg(test)]
pub const METHODS: Methods = Methods(&crate::methods_of_tests::ALL);

/// Meaning of a policy.
pub const fn policy_meaning(policy: Policy) -> &'static str {
    match policy {
        Policy::Pair => "all KV pairs of all layers and heads compete",
        Policy::PairFloor => {
            "all KV pairs compete, but every head keeps its best positions, at least a sixth of an even share"
        }
        Policy::PairKeydiff => {
            "as pair-floor, but where less than a fifth is kept KeyDiff's scores are added, with the more weight the less is kept"
        }
        Policy::PairUniform => "every layer and KV head keeps the same number of positions",
        Policy::PairBudget => {
            "every KV head keeps as many positions as its budget from the training labels says"
        }
        Policy::Token => "the same positions are kept in all layers and heads",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chart;

    #[test]
    fn every_place_of_a_long_registry_has_a_look_of_its_own() {
        let looks: Vec<(String, Marker)> = (0..44).map(|place| (colour(place), shape(place))).collect();
        for (i, look) in looks.iter().enumerate() {
            assert!(!looks[..i].contains(look), "place {i} looks like an earlier one: {look:?}");
            let colour = look.0.split(' ').next().unwrap();
            let defined = chart::CSS.matches(&format!("--{colour}:#")).count();
            assert_eq!(defined, 2, "{colour}, light and dark");
            assert_eq!(
                chart::CSS.matches(&format!(".{colour}{{--c:var(--{colour})}}")).count(),
                1,
                "{colour}"
            );
        }
        assert!(looks[2..].iter().all(|l| !["p0", "p1"].contains(&l.0.as_str())));
    }

    #[test]
    fn methods_of_another_version_come_last_under_their_names() {
        let [new, newer] = ["zz-new", "a-newer"].map(MethodName::new);
        let given = [new, MethodName::RANDOM, newer, MethodName::MAPPER, MethodName::KVZIP, new];
        let [mapper, kvzip, random] = [MethodName::MAPPER, MethodName::KVZIP, MethodName::RANDOM];
        assert_eq!(METHODS.ordered(given), [mapper, kvzip, random, new, newer]);
        assert_eq!(METHODS.oracles_first(given), [kvzip, mapper, random, new, newer]);
        assert_eq!((METHODS.class(new), METHODS.is_oracle(new)), (METHODS.class(newer), false));
    }
}
