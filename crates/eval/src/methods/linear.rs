//! Ridge regression from all features of the proxy.

use pkv_recipe::MethodName;

use super::method::{Method, Needs, Start};
use super::ridge::RidgeFit;

pub const METHOD: Method = Method {
    name: MethodName::LINEAR,
    label: "ridge, linear",
    meaning: "ridge regression from all features of the proxy",
    needs: Needs::FEATURES,
    start: |setup| Start::fit(RidgeFit::new(setup.mapper, None)?),
};
