//! `train.steps`: a number of steps, or `auto`; and what `auto` goes by.

use std::borrow::Cow;
use std::fmt;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{Error, Unexpected, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// How long training lasts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Steps {
    /// So many steps.
    Number(u64),
    /// Until validation no longer gains.
    Auto,
}

/// What ends a training whose steps are `auto`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AutoSteps {
    /// Most steps, the decay included.
    pub max_steps: u64,
    /// Validations in a row without a gain, after which the decay begins.
    pub patience: u64,
    /// Least rise of the validation score, a share of 1, that counts as a gain.
    pub min_gain: f64,
    /// Steps of the decay, as a share of those before it.
    pub decay: f64,
}

impl Default for AutoSteps {
    fn default() -> Self {
        Self {
            // Five times what the real pair gained by.
            max_steps: 20_000,
            // At a constant rate the score goes up and down by some tenths of a point from one validation to
            // the next: one or two without a gain say little.
            patience: 4,
            // A tenth of a point of recall; differences of one seed are established from about a point on.
            min_gain: 0.001,
            // A fifth of the whole: from there on a longer decay gains little (arXiv 2405.18392, section 3;
            // MiniCPM, arXiv 2404.06395, takes a tenth).
            decay: 0.25,
        }
    }
}

impl JsonSchema for Steps {
    fn schema_name() -> Cow<'static, str> {
        "Steps".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({"anyOf": [{"type": "integer", "minimum": 1}, {"const": "auto"}]})
    }
}

impl From<u64> for Steps {
    fn from(steps: u64) -> Self {
        Self::Number(steps)
    }
}

impl fmt::Display for Steps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Number(steps) => steps.fmt(f),
            Self::Auto => f.write_str("auto"),
        }
    }
}

impl Serialize for Steps {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Number(steps) => to.serialize_u64(*steps),
            Self::Auto => to.serialize_str("auto"),
        }
    }
}

impl<'de> Deserialize<'de> for Steps {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Either;

        impl Visitor<'_> for Either {
            type Value = Steps;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("u64 or `auto`")
            }

            fn visit_u64<E: Error>(self, steps: u64) -> Result<Steps, E> {
                Ok(Steps::Number(steps))
            }

            fn visit_i64<E: Error>(self, steps: i64) -> Result<Steps, E> {
                u64::try_from(steps)
                    .map(Steps::Number)
                    .map_err(|_| E::invalid_value(Unexpected::Signed(steps), &self))
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Steps, E> {
                match text {
                    "auto" => Ok(Steps::Auto),
                    _ => Err(E::invalid_type(Unexpected::Str(text), &self)),
                }
            }
        }

        from.deserialize_any(Either)
    }
}
