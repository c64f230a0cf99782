//! Ridge regression from all features.

use pkv_recipe::MethodName;

use super::method::{Method, Needs, Start};
use super::ridge::RidgeFit;

pub const METHOD: Method = Method {
    name: MethodName::LINEAR,
    meaning: "ridge regression from all features",
    needs: Needs::FEATURES,
    #[cfg(test)]
    held_by: ("src/methods/ridge.rs", "fn a_linear_target_is_found_exactly"),
    start: |setup| Start::fit(RidgeFit::new(setup.mapper, None)?),
};
