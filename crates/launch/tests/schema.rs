//! Jobs against what three minor versions of Kubernetes say of them (`schemas/make.py`).

use std::fs;
use std::path::Path;

use pkv_launch::{Launch, k8s};
use pkv_shard::RunLayout;
use serde_json::{Value, json};

use crate::jobs::{demo, launch};

const VERSIONS: [&str; 3] = ["1.29", "1.33", "1.37"];

/// Where `value` differs from `schema`, with the words of JSON Schema that these schemas use; another word is
/// a panic.
fn faults(root: &Value, schema: &Value, value: &Value, at: &str) -> Vec<String> {
    let mut out = Vec::new();
    for (word, said) in schema.as_object().expect("a schema is an object") {
        match word.as_str() {
            "$ref" => {
                let target = root.pointer(&said.as_str().unwrap()[1..]).expect("definitions are complete");
                out.extend(faults(root, target, value, at));
            }
            "type" => {
                let names = said.as_array().cloned().unwrap_or_else(|| vec![said.clone()]);
                let fits = |name: &Value| match name.as_str().unwrap() {
                    "string" => value.is_string(),
                    "integer" => value.is_i64(),
                    "number" => value.is_number(),
                    "boolean" => value.is_boolean(),
                    "object" => value.is_object(),
                    "array" => value.is_array(),
                    "null" => value.is_null(),
                    other => panic!("unknown type {other}"),
                };
                if !names.iter().any(fits) {
                    out.push(format!("{at}: {value} is not of type {said}"));
                }
            }
            "enum" if !said.as_array().unwrap().contains(value) => {
                out.push(format!("{at}: {value} is not in {said}"))
            }
            "required" => {
                let is_absent = |key: &&str| value.get(key).is_none();
                let absent = said.as_array().unwrap().iter().filter_map(Value::as_str).filter(is_absent);
                out.extend(absent.map(|key| format!("{at}.{key} is missing")));
            }
            "items" => {
                let entries = value.as_array().into_iter().flatten().enumerate();
                out.extend(entries.flat_map(|(i, entry)| faults(root, said, entry, &format!("{at}[{i}]"))));
            }
            "properties" | "additionalProperties" => {
                for (key, inner) in value.as_object().into_iter().flatten() {
                    let at = format!("{at}.{key}");
                    let own = &schema["properties"][key];
                    match (word.as_str(), own.is_null()) {
                        ("properties", false) => out.extend(faults(root, own, inner, &at)),
                        ("additionalProperties", true) if said == false => {
                            out.push(format!("{at} is unknown"))
                        }
                        ("additionalProperties", true) if said.is_object() => {
                            out.extend(faults(root, said, inner, &at))
                        }
                        _ => {}
                    }
                }
            }
            "oneOf" => {
                let fitting =
                    said.as_array().unwrap().iter().filter(|one| faults(root, one, value, at).is_empty());
                if fitting.count() != 1 {
                    out.push(format!("{at}: {value} fits none or several of {said}"));
                }
            }
            "enum" | "$defs" | "$id" | "format" => {}
            other => panic!("`{other}` is a word of the schema that this test does not know"),
        }
    }
    out
}

fn schema(version: &str) -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/schemas/job-{version}.json"));
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

#[test]
fn jobs_are_valid_in_three_versions_of_kubernetes() {
    let (mut recipe, run) = (demo(), RunLayout::new("runs/demo-nano"));
    let full = k8s::list(&launch(&recipe, &run, &["--recipe", "r.toml"]));
    recipe.launch = pkv_recipe::LaunchSection::default();
    let bare = k8s::list(&Launch { gpus_per_worker: 0, ..launch(&recipe, &run, &[]) });
    for version in VERSIONS {
        let schema = schema(version);
        for job in [&full, &bare].into_iter().flat_map(|list| list["items"].as_array().unwrap()) {
            let faults = faults(&schema, &schema, job, "job");
            assert!(faults.is_empty(), "Kubernetes {version}:\n{}", faults.join("\n"));
        }
    }
}

#[test]
fn a_wrong_job_is_found() {
    let (recipe, run) = (demo(), RunLayout::new("runs/demo-nano"));
    let right = k8s::list(&launch(&recipe, &run, &[]))["items"][1].clone();
    for version in VERSIONS {
        let schema = schema(version);
        for (place, wrong, said) in [
            ("/kind", json!("Jobs"), "is not in"),
            ("/spec/completions", json!("4"), "is not of type"),
            ("/spec/template/spec/containers/0/volumeMounts/0", json!({"name": "x"}), "mountPath is missing"),
            ("/spec/template/spec/containers/0/env/0/valu", json!("x"), "valu is unknown"),
            ("/spec/podFailurePolicy/rules/1/onExitCodes/values", json!(["130"]), "is not of type"),
            ("/spec/template/spec/containers/0/resources/limits/memory", json!({}), "fits none"),
        ] {
            let mut job = right.clone();
            let (parent, key) = place.rsplit_once('/').unwrap();
            match job.pointer_mut(parent).unwrap() {
                Value::Array(list) => list[key.parse::<usize>().unwrap()] = wrong,
                other => other[key] = wrong,
            }
            let faults = faults(&schema, &schema, &job, "job").join("\n");
            assert!(faults.contains(said), "{version} {place}: {faults}");
        }
    }
}
