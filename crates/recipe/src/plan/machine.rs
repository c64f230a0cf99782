//! The machine that a plan is for: its ceilings, and how near each stage comes to them.

use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Ceilings of one device and the shares of them that stages reach.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Machine {
    /// In a few words, for the table.
    pub name: String,
    /// Dense matrix products in the dtype used, 10^12 floating-point operations per second.
    pub tflops: f64,
    /// Copies within device memory, 10^9 bytes per second.
    pub copy_gb_per_sec: f64,
    /// Memory of the device, if a limit is known.
    pub memory_bytes: Option<u64>,
    /// A CPU computes in f32, a GPU in bf16, unless the recipe says otherwise.
    pub cpu: bool,
    /// GPUs of this kind; all other figures are of one.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub gpus: usize,
    /// Price of the machine in dollars, if it is known.
    #[serde(default)]
    pub usd_per_hour: Option<f64>,
    pub efficiency: Efficiency,
}

const fn one() -> usize {
    1
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes references")]
const fn is_one(n: &usize) -> bool {
    *n == 1
}

/// Name, name for readers, and of NVIDIA's data sheets: dense bf16 products (10^12 per second), memory's 10^9
/// bytes per second, its 10^9 bytes. None was measured here.
const CARDS: [(&str, &str, f64, f64, u64); 4] = [
    ("h100", "H100 SXM", 989.0, 3350.0, 80),
    ("a100", "A100 SXM 80 GB", 312.0, 2039.0, 80),
    ("l40s", "L40S", 362.0, 864.0, 48),
    ("rtx4090", "RTX 4090", 165.2, 1008.0, 24),
];

/// Share of `tflops` that a stage reaches, in (0, 1].
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Efficiency {
    pub label: f64,
    pub extract: f64,
    pub train: f64,
    pub answer: f64,
}

impl Machine {
    /// One H200: 790 TFLOP/s in bf16 and 4.3 TB/s, both measured.
    ///
    /// Labels: 0.76 of that, measured (8B, 8k to 131k; kvpress 0.5.5 reaches 0.36). Features:
    /// 0.6, measured (1B with surprisal, 8k and 32k). Training (f32 or TF32, small matrices) and
    /// answers (short forwards) are guesses.
    pub fn h200() -> Self {
        Self {
            name: "one H200, bf16".to_owned(),
            tflops: 790.0,
            copy_gb_per_sec: 4300.0,
            memory_bytes: Some(141_000_000_000),
            cpu: false,
            gpus: 1,
            usd_per_hour: None,
            efficiency: Efficiency { label: 0.76, extract: 0.6, train: 0.05, answer: 0.2 },
        }
    }

    /// Cards that were not measured: their names, and those for readers.
    pub fn cards() -> impl Iterator<Item = (&'static str, &'static str)> {
        CARDS.iter().map(|card| (card.0, card.1))
    }

    /// A card by its name, one of [`Machine::cards`].
    ///
    /// Rates are those of its data sheet times what an H200 reached of its own: 0.8 of the products, 0.9 of
    /// the copies. Shares are the H200's.
    pub fn card(name: &str) -> Option<Self> {
        let &(_, title, tflops, gbps, gb) = CARDS.iter().find(|card| card.0 == name)?;
        Some(Self::of_data_sheet(title, tflops, gbps, gb as f64))
    }

    fn of_data_sheet(title: &str, tflops: f64, gbps: f64, gb: f64) -> Self {
        Self {
            name: format!("one {title}, bf16"),
            tflops: 0.8 * tflops,
            copy_gb_per_sec: 0.9 * gbps,
            memory_bytes: Some((gb * 1e9) as u64),
            ..Self::h200()
        }
    }

    /// A GPU by the name that its driver gives, with the memory it has; rates of an H200 if it is none of
    /// [`Machine::cards`], which its name then says.
    pub fn gpu(model: Option<&str>, memory_bytes: Option<u64>) -> Self {
        let squeezed = |text: &str| text.to_lowercase().replace([' ', '-'], "");
        let model = squeezed(model.unwrap_or_default());
        let mut machine = match CARDS.iter().find(|card| model.contains(card.0)) {
            Some(card) => Self::card(card.0).unwrap_or_else(Self::h200),
            None if model.contains("h200") => Self::h200(),
            None => Self { name: "one GPU, bf16, at the rates of an H200".to_owned(), ..Self::h200() },
        };
        machine.memory_bytes = memory_bytes.or(machine.memory_bytes);
        machine
    }

    /// `threads` cores with AVX2 or wider: 100 GFLOP/s and 5 GB/s each.
    ///
    /// Shares are those of the demo pair on two cores, whose matrices are small: labels 24 s, features 24 s,
    /// 150 steps 44 s, answers 38 s.
    pub fn cpu(threads: usize) -> Self {
        let threads = threads.max(1);
        Self {
            name: format!("{threads} CPU {}, f32", if threads == 1 { "thread" } else { "threads" }),
            tflops: 0.1 * threads as f64,
            copy_gb_per_sec: 5.0 * threads as f64,
            memory_bytes: None,
            cpu: true,
            gpus: 1,
            usd_per_hour: None,
            efficiency: Efficiency { label: 0.2, extract: 0.12, train: 0.7, answer: 0.27 },
        }
    }

    /// As many of it.
    #[must_use]
    pub fn of_gpus(self, gpus: usize) -> Self {
        let name = match self.name.strip_prefix("one ") {
            Some(rest) if gpus > 1 => format!("{gpus} x {rest}"),
            _ => self.name,
        };
        Self { name, gpus: gpus.max(1), ..self }
    }

    /// Compute time plus copy time: stages overlap them little.
    pub(super) fn secs(&self, flops: f64, efficiency: f64, moved_bytes: f64) -> f64 {
        flops / (self.tflops * 1e12 * efficiency) + moved_bytes / (self.copy_gb_per_sec * 1e9)
    }
}

/// The machine that `plan` is asked about: a name, figures of a data sheet, or a name and a price.
#[derive(Clone, Debug, PartialEq)]
pub struct MachineChoice {
    /// One of [`MachineChoice::names`]; absent with figures.
    name: Option<String>,
    figures: Option<[f64; 3]>,
    gpus: Option<usize>,
    usd_per_hour: Option<f64>,
}

/// What `plan --machine` takes, for messages.
const SHAPE: &str = "a machine is a name (`h100`), figures of a data sheet (`tflops=142,gb=32,gbps=1800`), and for either a number \
     of GPUs and a price (`h100,gpus=2,usd_per_hour=5`)";
/// Keys of a machine's figures.
const FIGURES: [&str; 3] = ["tflops", "gb", "gbps"];

impl MachineChoice {
    /// This machine.
    pub fn here() -> Self {
        Self { name: Some("here".to_owned()), figures: None, gpus: None, usd_per_hour: None }
    }

    /// Every name, with its meaning.
    pub fn names() -> impl Iterator<Item = (&'static str, String)> {
        let measured = [
            ("here", "This machine: its GPU if there is one, else its CPU".to_owned()),
            ("cpu", "This CPU".to_owned()),
            ("h200", "H200, by our measurements".to_owned()),
        ];
        let cards = CARDS.iter().map(|card| (card.0, format!("{}, by its data sheet", card.1)));
        measured.into_iter().chain(cards)
    }

    /// The machine; `here` and `cpu` are asked for where they are meant.
    ///
    /// # Errors
    /// Those of `here`.
    pub fn machine<E>(
        &self,
        here: impl FnOnce() -> Result<Machine, E>,
        cpu: impl FnOnce() -> Machine,
    ) -> Result<Machine, E> {
        let machine = match (&self.figures, self.name.as_deref()) {
            (Some([tflops, gb, gbps]), _) => {
                let title = format!("GPU of {tflops} TFLOP/s, {gb} GB and {gbps} GB/s");
                Machine::of_data_sheet(&title, *tflops, *gbps, *gb)
            }
            (None, Some("cpu")) => cpu(),
            (None, Some("here") | None) => here()?,
            (None, Some(name)) => Machine::card(name).unwrap_or_else(Machine::h200),
        };
        let machine = match self.gpus.filter(|_| !machine.cpu) {
            Some(gpus) => machine.of_gpus(gpus),
            None => machine,
        };
        Ok(Machine { usd_per_hour: self.usd_per_hour, ..machine })
    }
}

impl FromStr for MachineChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut choice = Self { name: None, figures: None, gpus: None, usd_per_hour: None };
        let mut figures = [None; FIGURES.len()];
        for part in text.split(',').map(str::trim) {
            let Some((key, value)) = part.split_once('=') else {
                let known = Self::names().any(|(name, _)| name == part);
                let named = choice.name.replace(part.to_owned());
                if !known || named.is_some() {
                    let names: Vec<&str> = Self::names().map(|(name, _)| name).collect();
                    return Err(format!("`{part}` is none of {}; {SHAPE}", names.join(", ")));
                }
                continue;
            };
            let number = value.trim().parse().ok().filter(|v: &f64| v.is_finite() && *v > 0.0);
            let number = number.ok_or_else(|| format!("`{part}` has no positive number; {SHAPE}"))?;
            match FIGURES.iter().position(|figure| *figure == key.trim()) {
                Some(at) => figures[at] = Some(number),
                None if key.trim() == "usd_per_hour" => choice.usd_per_hour = Some(number),
                None if key.trim() == "gpus" && number.fract() == 0.0 && number <= 1024.0 => {
                    choice.gpus = Some(number as usize);
                }
                None if key.trim() == "gpus" => {
                    return Err(format!("`{part}` is no number of GPUs; {SHAPE}"));
                }
                None => {
                    return Err(format!(
                        "`{key}` is none of {}, gpus, usd_per_hour; {SHAPE}",
                        FIGURES.join(", ")
                    ));
                }
            }
        }
        match (choice.name.is_some(), figures) {
            (false, [Some(tflops), Some(gb), Some(gbps)]) => choice.figures = Some([tflops, gb, gbps]),
            (true, [None, None, None]) => {}
            (false, _) => {
                let absent: Vec<&str> =
                    FIGURES.iter().zip(figures).filter(|(_, v)| v.is_none()).map(|(key, _)| *key).collect();
                return Err(format!("`{}` is missing; {SHAPE}", absent.join("`, `")));
            }
            (true, _) => return Err(format!("a name has its own figures; {SHAPE}")),
        }
        Ok(choice)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine(text: &str) -> Result<Machine, String> {
        text.parse::<MachineChoice>()?.machine(|| Ok(Machine::cpu(3)), || Machine::cpu(2))
    }

    #[test]
    fn a_machine_is_a_name_or_figures_and_may_have_a_price() {
        for (name, _) in MachineChoice::names() {
            assert_eq!(machine(name).unwrap().usd_per_hour, None, "{name}");
        }
        assert_eq!(machine("here").unwrap(), Machine::cpu(3));
        assert_eq!(machine("cpu").unwrap(), Machine::cpu(2));
        let priced = Machine { usd_per_hour: Some(2.5), ..Machine::card("h100").unwrap() };
        assert_eq!(machine("h100,usd_per_hour=2.5").unwrap(), priced);
        let own = machine("tflops=989, gb=80, gbps=3350, usd_per_hour=2.5").unwrap();
        assert_eq!(Machine { name: priced.name.clone(), ..own.clone() }, priced);
        let two = machine("h100,gpus=2").unwrap();
        assert_eq!((two.gpus, two.name.as_str()), (2, "2 x H100 SXM, bf16"));
        assert_eq!(two.memory_bytes, priced.memory_bytes, "of each");
        assert_eq!(own.name, "one GPU of 989 TFLOP/s, 80 GB and 3350 GB/s, bf16");
        for (text, part) in [
            ("abacus", "none of here, cpu, h200, h100"),
            ("", "none of here"),
            ("h100,a100", "`a100` is none of"),
            ("tflops=9,gb=8", "`gbps` is missing"),
            ("usd_per_hour=1", "`tflops`, `gb`, `gbps` is missing"),
            ("h100,gb=40", "its own figures"),
            ("tflops=x,gb=8,gbps=1", "`tflops=x` has no positive number"),
            ("tflops=-1,gb=8,gbps=1", "no positive number"),
            ("tflops=1,gb=8,gbps=1,watts=3", "`watts` is none of tflops, gb, gbps, gpus, usd_per_hour"),
            ("h100,gpus=1.5", "`gpus=1.5` is no number of GPUs"),
        ] {
            let error = machine(text).unwrap_err();
            assert!(
                error.contains(part) && error.contains("`tflops=142,gb=32,gbps=1800`"),
                "{text}: {error}"
            );
        }
    }

    #[test]
    fn gpus_are_known_by_the_names_of_their_driver() {
        for (driver, card) in [
            ("NVIDIA H100 80GB HBM3", "h100"),
            ("NVIDIA A100-SXM4-80GB", "a100"),
            ("NVIDIA L40S", "l40s"),
            ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ] {
            assert_eq!(Machine::gpu(Some(driver), None), Machine::card(card).unwrap(), "{driver}");
        }
        assert_eq!(Machine::gpu(Some("NVIDIA H200"), None), Machine::h200());
        let other = Machine::gpu(Some("NVIDIA T4"), Some(16_000_000_000));
        assert!(other.name.contains("rates of an H200") && other.memory_bytes == Some(16_000_000_000));
        assert_eq!(Machine::gpu(None, None).tflops, Machine::h200().tflops);
    }
}
