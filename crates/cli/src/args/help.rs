//! Help as it is shown: commands in groups by purpose, options below headings, examples at the end.
//!
//! Every example runs as it is written: `tests/docs.rs` does so.

use clap::builder::StyledStr;
use clap::builder::styling::Style;
use clap::{Arg, ArgAction, Command, CommandFactory};

use super::{Cli, exit_codes};

/// Heading of the options that every command has.
pub const EVERYWHERE: &str = "Options of every command";

/// Commands by purpose.
const GROUPS: [(&str, &[&str]); 5] = [
    ("Start", &["doctor", "recipes", "plan", "fetch", "run", "sweep", "launch"]),
    ("Stages of run, in order", &["prepare", "label", "extract", "train", "eval", "export", "report"]),
    ("Inspect", &["inspect", "compare", "bench"]),
    ("Use", &["infer", "push"]),
    ("Editor, shell, manual", &["schema", "completions", "man", "help"]),
];

/// clap makes the command `help` itself.
const HELP: (&str, &str) = ("help", "Print this message or the help of a command");

/// Examples of a command; of 80 columns at most, else clap breaks their lines.
const EXAMPLES: [(&str, &[&str]); 22] = [
    ("doctor", &["doctor", "doctor --recipe recipes/demo.toml"]),
    (
        "recipes",
        &[
            "recipes ls",
            "recipes show demo-nano",
            "recipes init --target recipes/nano-llama/target \\\n      --data 'docs/*.md' --name own",
        ],
    ),
    (
        "plan",
        &[
            "plan --recipe recipes/demo.toml --machine h100",
            "plan --recipe recipes/demo.toml \\\n      --machine tflops=142,gb=32,gbps=1800,usd_per_hour=0.6",
            "plan --recipe recipes/demo.toml --calibrate runs/demo",
        ],
    ),
    ("fetch", &["fetch --recipe recipes/demo.toml"]),
    (
        "run",
        &[
            "run --recipe recipes/demo.toml",
            "run --recipe recipes/demo.toml \\\n      --set name=short --set train.steps=40",
        ],
    ),
    (
        "sweep",
        &[
            "sweep --recipe recipes/demo.toml \\\n      --vary mapper.variant=linear,mlp --dry-run",
            "sweep --recipe recipes/demo.toml \\\n      --vary train.steps=20,40 --out sweep.html",
        ],
    ),
    (
        "launch",
        &[
            "launch slurm --recipe recipes/demo.toml \\\n      --workers 4 --dry-run",
            "launch k8s --recipe recipes/demo.toml \\\n      --stages label --workers 4 --dry-run",
        ],
    ),
    ("prepare", &["prepare --recipe recipes/demo.toml --show 3   # as text"]),
    ("label", &["label --recipe recipes/demo.toml", "label --recipe recipes/demo.toml --devices cpu,cpu"]),
    ("extract", &["extract --recipe recipes/demo.toml"]),
    ("train", &["train --recipe recipes/demo.toml"]),
    (
        "eval",
        &[
            "eval --recipe recipes/demo.toml \\\n      --tasks facts --methods mapper,kvzip",
            "eval --recipe recipes/demo.toml --show 1   # the prompts alone",
        ],
    ),
    ("export", &["export --recipe recipes/demo.toml"]),
    ("report", &["report --recipe recipes/demo.toml"]),
    (
        "inspect",
        &[
            "inspect runs   # a list of runs",
            "inspect runs/demo/eval",
            "inspect runs/demo/labels --against runs/base/labels",
        ],
    ),
    ("compare", &["compare base ablation", "compare runs/base runs/ablation --out comparison.html"]),
    (
        "bench",
        &[
            "bench label --recipe recipes/demo.toml \\\n      --random-weights --context 64",
            "bench decode --recipe recipes/demo.toml --context 64",
        ],
    ),
    (
        "infer",
        &[
            "infer --mapper runs/demo --context book.txt \\\n      --question 'Who keeps the tower?'",
            "infer --mapper runs/demo --context book.txt --retain 10% \\\n      \
             --compare-full --question 'Who keeps the tower?'",
        ],
    ),
    ("push", &["push runs/demo --repo you/your-mapper   # shows what is sent"]),
    ("schema", &["schema > recipe.schema.json", "schema --reference"]),
    ("completions", &["completions bash   # ~/.bashrc: source <(... completions bash)"]),
    ("man", &["man manual   # then: man -l manual/proxykv-train.1"]),
];

/// The command line with all of its help.
pub fn command() -> Command {
    let help = Arg::new("help").short('h').long("help").action(ArgAction::Help).global(true);
    let help = help.help_heading(EVERYWHERE).help("Print help; `-h` prints less");
    let mut command = Cli::command().disable_help_flag(true).arg(help);
    let template = template(&command);
    for (name, lines) in EXAMPLES {
        command = command.mut_subcommand(name, |own| {
            let end = if name == "infer" { format!("\n\n{}", exit_codes()) } else { String::new() };
            own.after_help(StyledStr::from(format!("{}{end}", examples(lines))))
        });
    }
    command.help_template(StyledStr::from(template)).after_help(exit_codes())
}

/// As clap shows headings, without color if the terminal has none.
fn heading(text: &str) -> String {
    let style = Style::new().bold().underline();
    format!("{style}{text}:{style:#}")
}

fn examples(lines: &[&str]) -> String {
    heading("Examples") + &lines.iter().map(|line| format!("\n  proxykv-train {line}")).collect::<String>()
}

/// Help of the whole command: what it is, its commands in groups, what all of them take.
fn template(command: &Command) -> String {
    let bold = Style::new().bold();
    let about = |name: &str| {
        let of = command.get_subcommands().find(|own| own.get_name() == name).and_then(Command::get_about);
        of.map_or_else(|| HELP.1.to_owned(), ToString::to_string)
    };
    let group = |(title, names): &(&str, &[&str])| {
        let line = |name: &&str| format!("\n  {bold}{name:11}{bold:#}  {}", about(name));
        heading(title) + &names.iter().map(line).collect::<String>() + "\n\n"
    };
    let groups: String = GROUPS.iter().map(group).collect();
    let options = heading(EVERYWHERE);
    format!(
        "{{before-help}}{{about-with-newline}}\n{{usage-heading}} {{usage}}\n\n{groups}{options}\n{{options}}{{after-help}}"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_command_is_in_one_group_and_has_examples() {
        let command = command();
        let mut grouped: Vec<&str> = GROUPS.iter().flat_map(|(_, names)| names.iter().copied()).collect();
        grouped.retain(|name| *name != HELP.0);
        let mut with_examples: Vec<&str> = EXAMPLES.iter().map(|(name, _)| *name).collect();
        let mut all: Vec<&str> = command.get_subcommands().map(Command::get_name).collect();
        for names in [&mut grouped, &mut with_examples, &mut all] {
            names.sort_unstable();
        }
        assert_eq!(grouped, all);
        assert_eq!(with_examples, all);
        for (name, lines) in EXAMPLES {
            assert!((1..=3).contains(&lines.len()) && lines.iter().all(|l| l.starts_with(name)), "{name}");
            let shown = examples(lines);
            assert!(shown.lines().skip(1).all(|line| line.len() <= 80), "{shown}");
        }
    }

    #[test]
    fn the_list_of_commands_fits_80_columns() {
        let text = command().render_help().to_string();
        let (_, list) = text.split_once("Start:").unwrap();
        let (list, options) = list.split_once(EVERYWHERE).unwrap();
        assert_eq!(list.lines().filter(|line| line.starts_with("  ")).count(), EXAMPLES.len() + 1, "{list}");
        assert!(list.lines().all(|line| line.len() <= 80), "{list}");
        assert!(!list.contains(HELP.1) || list.matches(HELP.1).count() == 1, "an about is missing\n{list}");
        assert!(options.contains("--device") && options.contains("Exit codes:"), "{options}");
    }

    #[test]
    fn options_of_every_command_are_below_their_heading() {
        for name in ["completions", "plan", "infer", "prepare"] {
            let asked = command().try_get_matches_from(["proxykv-train", name, "--help"]);
            let text = asked.unwrap_err().render().to_string();
            let (own, everywhere) = text.split_once(EVERYWHERE).unwrap_or_else(|| panic!("{text}"));
            for option in ["--device", "--threads", "--runs", "--json", "--verbose", "--help"] {
                let is_listed = |part: &str| {
                    part.lines().any(|line| {
                        line.trim_start()
                            .trim_start_matches("-v, ")
                            .trim_start_matches("-h, ")
                            .starts_with(option)
                    })
                };
                assert!(is_listed(everywhere) && !is_listed(own), "{name} {option}\n{text}");
            }
            if name == "plan" {
                let (options, recipe) = own.split_once("Recipe and documents:").unwrap();
                assert!(options.contains("--machine") && recipe.contains("--data"), "{text}");
            }
        }
    }
}
