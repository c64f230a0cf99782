//! Provenance of the numbers: settings, versions, the command to reproduce them, and limits.

use pkv_recipe::plan::{Machine, Plan, Work};
use pkv_recipe::{MapperSection, Recipe, Variant};
use serde::Serialize;

use crate::headline::{TOY_SHARE, proxy, short};
use crate::run::RunData;

#[derive(Serialize)]
pub struct Origin {
    /// Choice and value, in words.
    pub choices: Vec<(String, String)>,
    /// The recipe as TOML, every default written out.
    pub recipe: Option<String>,
    /// The command.
    pub command: Option<String>,
    /// Revisions, versions, seed.
    pub versions: Vec<(String, String)>,
}

pub fn origin(data: &RunData) -> Origin {
    Origin {
        choices: data.recipe.as_ref().map(choices).unwrap_or_default(),
        recipe: data.recipe.as_ref().map(Recipe::to_toml),
        command: data
            .run
            .recipe_path
            .as_ref()
            .map(|path| format!("proxykv-train run --recipe {}", shell_word(path))),
        versions: versions(data),
    }
}

fn choices(recipe: &Recipe) -> Vec<(String, String)> {
    let (label, extract, train) = (&recipe.label, &recipe.extract, &recipe.train);
    let mut out = Vec::new();
    let mut say = |what: &str, value: String| out.push((what.to_owned(), value));
    say("Label", label.definition());
    say(
        "Target of training",
        match train.target_pool.blend {
            b if b == 0.0 || train.target_pool.width == 1 => "log-odds of the raw score".to_owned(),
            b => format!(
                "log-odds, {b} of each blended with the maximum over {} positions",
                train.target_pool.width
            ),
        },
    );
    for &source in &extract.from {
        let channels: Vec<&str> = extract.channels_of(source).iter().map(|c| c.name()).collect();
        say(&format!("Features per {} KV head", source.name()), channels.join(", "));
    }
    let globals: Vec<&str> = extract.globals.iter().map(|c| c.name()).collect();
    say("Features per position", if globals.is_empty() { "none".to_owned() } else { globals.join(", ") });
    say("Mapper", mapper(&recipe.mapper));
    let terms = [
        ("binary", recipe.loss.binary),
        ("value MSE", recipe.loss.value_mse),
        ("fine", recipe.loss.fine),
        ("global", recipe.loss.global),
        ("cosine", recipe.loss.cosine),
    ];
    let on: Vec<String> = terms.iter().filter(|t| t.1 > 0.0).map(|t| format!("{} × {}", t.1, t.0)).collect();
    say("Loss", on.join(" + "));
    let ema = if train.ema > 0.0 { format!(", moving average {}", train.ema) } else { String::new() };
    say(
        "Training",
        format!(
            "{} steps of {} contexts, AdamW, peak learning rate {}, weight decay {}{ema}",
            train.steps_in_words(),
            train.batch,
            train.lr,
            train.weight_decay
        ),
    );
    let windows: Vec<String> = recipe.data.window_tokens.iter().map(ToString::to_string).collect();
    say(
        "Data",
        format!(
            "{} training, {} validation, {} test examples of {} tokens; {}",
            recipe.data.train,
            recipe.data.validation,
            recipe.data.test,
            windows.join(" / "),
            recipe.data.manifest
        ),
    );
    out
}

fn mapper(m: &MapperSection) -> String {
    let skip = if m.linear_skip { ", ridge-initialized linear skip" } else { "" };
    let dilations: Vec<String> = m.dilations.iter().map(ToString::to_string).collect();
    let time = format!(
        "{} wide, convolutions over time of {} with dilations {}",
        m.width,
        m.kernel,
        dilations.join(" ")
    );
    match m.variant {
        Variant::HybridAxial => format!(
            "hybrid-axial: {} per proxy head, {time}, cross-attention over heads {} wide{skip}",
            m.head_width, m.cross_width
        ),
        Variant::Conv => format!("conv: {time}{skip}"),
        Variant::Mlp => format!("mlp: {} wide, position by position{skip}", m.width),
        Variant::Linear => "linear: the ridge solution".to_owned(),
    }
}

fn versions(data: &RunData) -> Vec<(String, String)> {
    let mut out = Vec::new();
    let mut say = |what: &str, value: Option<String>| out.extend(value.map(|v| (what.to_owned(), v)));
    let proxy = data.run.proxy.as_ref().filter(|_| proxy(data).is_some());
    for (role, found) in [("target", data.run.target.as_ref()), ("proxy", proxy)] {
        say(
            role,
            found.map(|m| {
                m.revision.as_ref().map_or_else(|| m.model.clone(), |r| format!("{} @ {r}", m.model))
            }),
        );
    }
    say("mapper", data.results.as_ref().map(|r| r.mapper.clone()));
    say("seed", data.run.seed.map(|s| s.to_string()));
    say(
        "proxykv-train",
        data.run.tool.as_ref().map(|tool| match tool.commit.as_str() {
            "" => tool.version.clone(),
            commit => format!("{} ({commit})", tool.version),
        }),
    );
    say("libtorch", data.run.libtorch.clone());
    say("device", data.run.device.clone());
    say("fingerprint of the evaluation", data.results.as_ref().map(|r| r.fingerprint.clone()));
    out
}

/// Limits of these numbers.
pub fn limits(data: &RunData) -> Vec<String> {
    let mut out = Vec::new();
    if let Some(results) = &data.results {
        let target = short(&results.target.name);
        let of = proxy(data).map_or_else(
            || format!("One model ({target})"),
            |p| format!("One pair ({target}, {})", short(&p)),
        );
        out.push(format!(
            "{of}, one training run, one seed: another seed may move accuracies by as much as \
             their intervals."
        ));
        if let Some(facts) = &results.facts {
            out.push(format!(
                "The questions are about facts planted in documents ({} contexts, {} questions): retrieval of short \
                 statements, not summaries or reasoning.",
                facts.contexts, facts.questions
            ));
        }
    }
    if let Some(recipe) = &data.recipe {
        let longest = recipe
            .data
            .window_tokens
            .iter()
            .chain(&recipe.data.test_window_tokens)
            .max()
            .copied()
            .unwrap_or(0);
        out.push(format!(
            "Training contexts have at most {longest} tokens, contexts of the questions {}; longer ones were not measured.",
            recipe.eval.context_tokens
        ));
        let share = Plan::new(recipe, Machine::h200(), &Work::default()).mapper.share_of_prefill;
        let cost = if share < TOY_SHARE {
            "The mapper's share of the prefill is a count of operations, not a time".to_owned()
        } else {
            format!(
                "Beside a target this small the mapper is expensive: it costs {:.0}% of the prefill's operations, \
                 a share that shrinks as targets grow",
                100.0 * share
            )
        };
        out.push(match recipe.read_proxy() {
            Some(_) => format!(
                "{cost}; the proxy's own prefill comes on top and runs beside the target's where there are two devices."
            ),
            None => format!("{cost}; taking the features during the target's prefill comes on top."),
        });
    }
    out.push(
        "Pruned pairs are masked, which is exactly what evicting them computes; memory saved is not measured here."
            .to_owned(),
    );
    out
}

/// `text` as one word of a POSIX shell.
fn shell_word(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+=:@%".contains(c);
    if !text.is_empty() && text.chars().all(plain) {
        text.to_owned()
    } else {
        format!("'{}'", text.replace('\'', "'\\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_become_one_word() {
        assert_eq!(shell_word("recipes/tiny-llama.toml"), "recipes/tiny-llama.toml");
        assert_eq!(shell_word("my recipe's.toml"), "'my recipe'\\''s.toml'");
    }
}
