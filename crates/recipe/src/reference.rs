//! The recipe reference, `docs/recipes.md`: every key with its type, default and meaning, as Markdown.
//!
//! Written by `proxykv-train schema --reference`; a test holds the file against it.

use std::fmt::Write;

use crate::schema::{Key, Keys};

const HEAD: &str = "# Recipe reference

Written by `proxykv-train schema --reference` from the program's own documentation; do not edit it by hand. `proxykv-train schema`
prints a JSON schema for editors. With Even Better TOML (taplo), put this on the first line of a recipe after
`proxykv-train schema > recipe.schema.json`:

```toml
#:schema ./recipe.schema.json
```

`base = \"other.toml\"` puts a recipe on top of another beside it: it then says only what differs. Every key can be set on the
command line, `--set train.lr=0.001`; `proxykv-train plan --resolved` prints all of them with where each value comes from.
Absent means that the key may be left out, and what happens then.
";

/// The whole page; `registries` are the keys whose values other crates know, each with its names and their
/// meanings.
pub fn reference(registries: &[(&str, Vec<(&str, &str)>)]) -> String {
    let all = Keys::all();
    let mut out = HEAD.to_owned();
    let top: Vec<&Key> = all.keys.iter().filter(|key| key.section.is_empty()).collect();
    out.push_str("\n## At the top\n");
    table(&mut out, &top);
    for section in &all.sections {
        let keys: Vec<&Key> = all.keys.iter().filter(|key| key.section == section.path).collect();
        let _ = write!(out, "\n## [{}]\n\n{}\n", section.path, cell(&section.meaning));
        // Both models have the same keys.
        if let Some(rest) = section.path.strip_prefix("proxy") {
            let _ = write!(out, "\nThe keys of [[target{rest}]](#target{}).\n", rest.replace('.', ""));
            continue;
        }
        if keys.is_empty() {
            continue;
        }
        table(&mut out, &keys);
        for (i, key) in keys.iter().enumerate() {
            let alike = |other: &&&Key| !other.choices.is_empty() && other.choices == key.choices;
            if let Some(first) = keys[..i].iter().find(alike) {
                let _ = write!(out, "\nThe names of `{}` are those of `{}`.\n", key.name, first.name);
                continue;
            }
            let own: Vec<(&str, &str)> = match registries.iter().find(|(path, _)| *path == key.path) {
                Some((_, names)) => names.clone(),
                None => key.choices.iter().map(|(name, said)| (name.as_str(), said.as_str())).collect(),
            };
            if own.is_empty() {
                continue;
            }
            let _ = write!(out, "\n| `{}` | |\n|---|---|\n", key.name);
            for (name, said) in own {
                let _ = writeln!(out, "| `{name}` | {} |", cell(said));
            }
        }
    }
    out
}

fn table(out: &mut String, keys: &[&Key]) {
    out.push_str("\n| key | type | default | meaning |\n|---|---|---|---|\n");
    for key in keys {
        let default = match &key.default {
            Some(default) => format!("`{default}`"),
            None if key.required => "must be set".to_owned(),
            None => "absent".to_owned(),
        };
        let _ = writeln!(out, "| `{}` | {} | {default} | {} |", key.name, key.kind, cell(&key.meaning));
    }
}

/// `text` in a cell: no pipe splits it, no bracket links from it.
fn cell(text: &str) -> String {
    text.replace('|', "\\|").replace("[`", "`").replace("`]", "`").replace("[[source]]", "`[[source]]`")
}
