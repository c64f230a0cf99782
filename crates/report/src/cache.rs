//! Bytes of the KV cache, below the shares kept that a table names.

use pkv_recipe::DtypeName;
use pkv_recipe::plan::human_bytes;

use crate::run::RunData;
use crate::tables::Table;

impl Table {
    /// Under each share kept, what it is of `cache`; other columns have nothing below.
    pub fn with_bytes(mut self, cache: Option<&Cache>) -> Self {
        let Some(cache) = cache else { return self };
        let below = |name: &String| -> Option<String> {
            let percent: f64 = name.strip_suffix("% kept")?.parse().ok()?;
            Some(human_bytes((percent / 100.0 * cache.bytes).round() as u64))
        };
        let under: Vec<String> = self.columns.iter().map(|name| below(name).unwrap_or_default()).collect();
        if under.iter().any(|text| !text.is_empty()) {
            self.note = format!("{} {}", self.note, cache.text()).trim().to_owned();
            self.under = under;
        }
        self
    }
}

/// The whole cache of a context of mean length.
pub struct Cache {
    tokens: f64,
    bytes: f64,
}

impl Cache {
    /// `None` where the recipe or the contexts' length is not known.
    pub fn of(data: &RunData) -> Option<Self> {
        let (recipe, labels) = (data.recipe.as_ref()?, &data.results.as_ref()?.labels);
        let tokens = labels.positions as f64 / labels.contexts as f64;
        let on_cpu = data.run.device.as_deref() == Some("cpu");
        let element = match recipe.target.dtype {
            DtypeName::F32 => 4,
            DtypeName::Auto if on_cpu => 4,
            DtypeName::Auto | DtypeName::Bf16 => 2,
        };
        let bytes = tokens * (element * recipe.target.shape.kv_elements_per_token()) as f64;
        bytes.is_finite().then_some(Self { tokens, bytes })
    }

    fn text(&self) -> String {
        format!(
            "Below each share: bytes of the KV pairs kept, of {} for a context of {:.0} tokens.",
            human_bytes(self.bytes as u64),
            self.tokens
        )
    }
}
