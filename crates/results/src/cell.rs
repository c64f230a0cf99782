//! The cells of a table: a method, a policy and a retention ratio; and values by cell.

use pkv_core::{Policy, RetentionRatio};
use pkv_recipe::MethodName;
use serde::{Deserialize, Serialize};

/// One way to prune a cache.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Cell {
    pub method: MethodName,
    pub policy: Policy,
    pub ratio: RetentionRatio,
}

impl Cell {
    /// Every combination: methods outermost, ratios innermost, each in the order given.
    pub fn all(methods: &[MethodName], policies: &[Policy], ratios: &[RetentionRatio]) -> Vec<Self> {
        let mut cells = Vec::with_capacity(methods.len() * policies.len() * ratios.len());
        for &method in methods {
            for &policy in policies {
                cells.extend(ratios.iter().map(|&ratio| Self { method, policy, ratio }));
            }
        }
        cells
    }

    /// Every cell of several contexts, each once: methods and policies in the order of first sight, ratios
    /// from the most kept to the least.
    pub fn union(cells: impl Iterator<Item = Self>) -> Vec<Self> {
        let (mut all, mut methods, mut policies): (Vec<Self>, Vec<_>, Vec<_>) = Default::default();
        for cell in cells {
            if !all.contains(&cell) {
                all.push(cell);
                methods.push(cell.method);
                policies.push(cell.policy);
            }
        }
        let place = |c: &Self| {
            let method = methods.iter().position(|m| *m == c.method);
            (method, policies.iter().position(|p| *p == c.policy))
        };
        all.sort_by(|a, b| place(a).cmp(&place(b)).then(b.ratio.get().total_cmp(&a.ratio.get())));
        all
    }

    /// KVzip's own scores under the same policy and ratio.
    pub fn of_kvzip(self) -> Self {
        Self { method: MethodName::KVZIP, ..self }
    }
}

/// Values of one context by cell, in the order of measuring.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Cells<V>(Vec<(Cell, V)>);

impl<V> Default for Cells<V> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<V> FromIterator<(Cell, V)> for Cells<V> {
    fn from_iter<I: IntoIterator<Item = (Cell, V)>>(cells: I) -> Self {
        Self(cells.into_iter().collect())
    }
}

impl<V> Cells<V> {
    pub fn get(&self, cell: &Cell) -> Option<&V> {
        self.0.iter().find(|(c, _)| c == cell).map(|(_, value)| value)
    }

    pub fn cells(&self) -> impl Iterator<Item = Cell> {
        self.0.iter().map(|(cell, _)| *cell)
    }

    pub fn values_mut(&mut self) -> impl Iterator<Item = &mut V> {
        self.0.iter_mut().map(|(_, value)| value)
    }

    /// Add the cells that are not there; those that are stay as they were.
    pub fn add(&mut self, others: Self) {
        for (cell, value) in others.0 {
            if self.get(&cell).is_none() {
                self.0.push((cell, value));
            }
        }
    }
}

/// The ratio nearest to `wanted`, as factors go.
///
/// # Panics
/// There is none.
pub fn nearest(ratios: &[RetentionRatio], wanted: f64) -> RetentionRatio {
    let distance = |r: &RetentionRatio| (r.get() / wanted).ln().abs();
    *ratios.iter().min_by(|a, b| distance(a).total_cmp(&distance(b))).expect("a recipe names a ratio")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cell(method: MethodName, ratio: f64) -> Cell {
        Cell { method, policy: Policy::Pair, ratio: RetentionRatio::new(ratio).unwrap() }
    }

    #[test]
    fn what_was_measured_stays_and_the_union_is_in_order() {
        let mut cells: Cells<u32> = [(cell(MethodName::MAPPER, 0.05), 1)].into_iter().collect();
        let others = [
            (cell(MethodName::MAPPER, 0.05), 9),
            (cell(MethodName::RANDOM, 0.05), 2),
            (cell(MethodName::MAPPER, 0.2), 3),
        ];
        cells.add(others.into_iter().collect());
        assert_eq!(cells.get(&cell(MethodName::MAPPER, 0.05)), Some(&1));
        assert_eq!(cells.get(&cell(MethodName::KVZIP, 0.05)), None);
        let expected =
            [cell(MethodName::MAPPER, 0.2), cell(MethodName::MAPPER, 0.05), cell(MethodName::RANDOM, 0.05)];
        assert_eq!(Cell::union(cells.cells().chain(cells.cells())), expected);
    }
}
