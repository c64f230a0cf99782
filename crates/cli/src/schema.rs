//! `schema`: the JSON schema of recipes, or the recipe reference, with this program's methods and scorers.

use anyhow::Result;
use pkv_eval::methods;
use serde_json::{Value, json};

use crate::output;

/// # Errors
/// stdout takes no more.
pub fn run(reference: bool) -> Result<()> {
    let methods: Vec<_> = methods::REGISTRY.iter().map(|m| (m.name.name(), m.meaning)).collect();
    let scorers: Vec<_> = pkv_score::scorers().collect();
    if reference {
        let registries = [("label.scorer", scorers), ("eval.methods", methods)];
        return output::print(&pkv_recipe::reference::reference(&registries));
    }
    let named = |names: &[(&str, &str)]| -> Value {
        names.iter().map(|(name, meaning)| json!({"const": name, "description": meaning})).collect()
    };
    let mut schema = pkv_recipe::schema::schema();
    schema["$defs"]["LabelSection"]["properties"]["scorer"]["oneOf"] = named(&scorers);
    schema["$defs"]["EvalSection"]["properties"]["methods"]["items"] = json!({"oneOf": named(&methods)});
    output::print_json(&schema)
}
