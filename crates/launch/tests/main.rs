//! Jobs as they are submitted, held against stored files, the shell and the schemas of Kubernetes.

mod jobs;
mod quoting;
mod schema;
