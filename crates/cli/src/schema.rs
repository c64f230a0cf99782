//! `schema`: the JSON schema of recipes, or the recipe reference, with the methods that this program has.

use anyhow::Result;
use pkv_eval::methods::REGISTRY;
use serde_json::{Value, json};

use crate::output;

/// # Errors
/// stdout takes no more.
pub fn run(reference: bool) -> Result<()> {
    let methods: Vec<(&str, &str)> = REGISTRY.iter().map(|m| (m.name.name(), m.meaning)).collect();
    if reference {
        return output::print(&pkv_recipe::reference::reference(&methods));
    }
    let mut schema = pkv_recipe::schema::schema();
    let named: Vec<Value> =
        methods.iter().map(|(name, meaning)| json!({"const": name, "description": meaning})).collect();
    schema["$defs"]["EvalSection"]["properties"]["methods"]["items"] = json!({"oneOf": named});
    output::print_json(&schema)
}
