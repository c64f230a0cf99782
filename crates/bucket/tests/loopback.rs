//! Working copies of servers as Amazon's, Google's and Azure's on the loopback interface, with the faults
//! that networks have.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use pkv_bucket::{Address, Options, mount};
use pkv_core::{Fingerprint, Hinted};
use pkv_files::{
    Claim, DurableFile, WriteBudget, file_len, is_changed, lock_dir, open_file, share_dir, write_file,
};
use pkv_shard::{Claimed, Ended, Pieces, PiecesPlan, PiecesState, Worker};
use pkv_test_support::bucket::{Fault, Kind, Object, Server};
use tempfile::TempDir;

/// Azure takes base64 alone.
const SECRET: &str = "YS1zZWNyZXQtYWNjZXNzLWtleQ==";

/// What networks and servers under load do, one after another.
const FAULTS: [Fault; 7] = [
    Fault::Status(500),
    Fault::Status(503),
    Fault::HangUp,
    Fault::LoseAnswer,
    Fault::HalfBody,
    Fault::Stall,
    Fault::Status(412),
];

/// Of leases: a process of a machine under load renews one in a quarter of it, and is late by less than it.
const TERM: Duration = Duration::from_secs(2);

/// A machine: its cache, and the root of the bucket's working copy.
struct Machine {
    _cache: TempDir,
    root: PathBuf,
}

fn options(server: &Server, cache: &Path) -> Options {
    let variables = server.variables("an-access-key", SECRET).into_iter();
    Options {
        cache: cache.to_owned(),
        cache_bytes: 1 << 30,
        patience: Duration::from_millis(700),
        lease: TERM,
        retry: Duration::from_secs(20),
        variables: variables.map(|(k, v)| (k.to_owned(), v.to_owned())).collect(),
    }
}

fn machine(server: &Server) -> Machine {
    machine_with(server, |_| ())
}

fn machine_with(server: &Server, change: impl FnOnce(&mut Options)) -> Machine {
    let cache = tempfile::tempdir().unwrap();
    let mut options = options(server, cache.path());
    change(&mut options);
    let address = format!("{}://b/runs", server.kind.scheme());
    let root = mount(&Address::parse(&address).unwrap(), &options).unwrap();
    fs::create_dir_all(root.join("r/labels")).unwrap();
    Machine { _cache: cache, root }
}

impl Machine {
    fn path(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    fn write(&self, name: &str, content: &[u8]) -> anyhow::Result<()> {
        write_file(&self.path(name), content, &WriteBudget::unlimited()).map(drop)
    }

    fn read(&self, name: &str) -> Vec<u8> {
        let mut content = Vec::new();
        open_file(&self.path(name)).unwrap().read_to_end(&mut content).unwrap();
        content
    }
}

/// Bytes that no compression and no shifted part would leave the same.
fn bytes(n: usize, mut seed: u64) -> Vec<u8> {
    let mut next = || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed as u8
    };
    (0..n).map(|_| next()).collect()
}

/// One test for each kind of bucket.
macro_rules! of_each_kind {
    ($($test:ident),* $(,)?) => {
        mod s3 { $(#[test] fn $test() { super::$test(&super::Server::start(super::Kind::S3)); })* }
        mod google { $(#[test] fn $test() { super::$test(&super::Server::start(super::Kind::Google)); })* }
        mod azure { $(#[test] fn $test() { super::$test(&super::Server::start(super::Kind::Azure)); })* }
    };
}

of_each_kind! {
    a_file_is_in_the_bucket_before_it_is_here_and_another_machine_has_the_same_bytes,
    a_file_that_fails_to_reach_the_bucket_is_not_here_either_and_no_secret_is_said,
    of_two_machines_that_write_one_file_one_is_refused_and_goes_on_with_what_is_there,
    what_is_known_by_a_listing_alone_is_brought_once_and_replaced_under_a_condition,
    a_claim_is_one_machines_until_it_gives_no_sign_of_life,
    a_claim_that_was_dropped_is_taken_again,
    a_folder_is_held_alone_or_shared_across_machines,
    what_was_held_alone_and_lost_is_not_written_any_more,
    the_cache_holds_no_more_than_its_limit_and_an_open_shard_stays,
    what_is_written_without_us_is_pushed_and_what_is_removed_goes,
    bytes_that_were_changed_on_the_way_are_refused,
    a_shared_folder_is_one_folder_for_all_machines_until_its_link_goes,
    a_folder_moves_whole_and_its_shards_keep_their_hashes,
    pieces_of_a_stage_are_known_by_one_listing,
    a_shard_that_was_kept_in_part_has_its_whole_size_once_it_is_marked,
}

fn a_file_is_in_the_bucket_before_it_is_here_and_another_machine_has_the_same_bytes(server: &Server) {
    let (a, b) = (machine(server), machine(server));
    let (small, large) = (bytes(1000, 1), bytes((20 << 20) + 7, 2));
    server.every_nth(4, &FAULTS);
    a.write("r/labels/index.json", &small).unwrap();
    let mut shard =
        DurableFile::create(&a.path("r/labels/labels-00000.parquet"), WriteBudget::unlimited()).unwrap();
    shard.write_all(&large).unwrap();
    let published = shard.publish().unwrap();
    let there = server.objects("/b/r/labels/");
    assert_eq!(there.keys().collect::<Vec<_>>(), ["index.json", "labels-00000.parquet"]);
    assert!(there["index.json"] == small && there["labels-00000.parquet"] == large);
    assert!(server.state().uploads.is_empty(), "no part is left");

    pkv_files::pull(&b.path("r")).unwrap();
    assert!(fs::read(b.path("r/labels/index.json")).unwrap() == small);
    assert!(!b.path("r/labels/labels-00000.parquet").exists(), "shards come when they are opened");
    assert_eq!(file_len(&b.path("r/labels/labels-00000.parquet")).unwrap(), large.len() as u64);
    assert!(b.read("r/labels/labels-00000.parquet") == large);
    assert_eq!(pkv_files::sha256_file(&b.path("r/labels/labels-00000.parquet")).unwrap(), published.sha256);
}

fn a_file_that_fails_to_reach_the_bucket_is_not_here_either_and_no_secret_is_said(server: &Server) {
    let a = machine(server);
    a.write("r/plan.json", b"old").unwrap();
    server.every_nth(1, &[Fault::Status(403)]);
    let error = a.write("r/plan.json", b"new").unwrap_err();
    let all = format!("{error:#} {error:?} {:?}", Hinted::find(&error).map(Hinted::hint));
    assert!(
        all.contains(&format!("cannot write `{}://b/r/plan.json`", server.kind.scheme()))
            && all.contains("credentials"),
        "{all}"
    );
    server.every_nth(1, &[Fault::Status(500)]);
    let b = machine_with(server, |o| o.retry = Duration::from_millis(100));
    let error = b.write("r/x.json", b"new").unwrap_err();
    let said = format!("{all} {error:#} {error:?}");
    for secret in [SECRET, "an-access-key", "Signature="] {
        assert!(!said.contains(secret), "{said}");
    }
    assert!(!b.path("r/x.json").exists());
    assert_eq!(fs::read(a.path("r/plan.json")).unwrap(), b"old");
    assert_eq!(fs::read_dir(a.path("r")).unwrap().count(), 2, "no temporary file is left");
}

fn of_two_machines_that_write_one_file_one_is_refused_and_goes_on_with_what_is_there(server: &Server) {
    let (a, b) = (machine(server), machine(server));
    a.write("r/run.json", b"first").unwrap();
    let error = b.write("r/run.json", b"second").unwrap_err();
    assert!(is_changed(&error), "{error:#}");
    pkv_files::refresh(&b.path("r/run.json")).unwrap();
    assert_eq!(fs::read(b.path("r/run.json")).unwrap(), b"first");
    b.write("r/run.json", b"second").unwrap();
    // What does not change costs no bytes.
    pkv_files::refresh(&a.path("r/run.json")).unwrap();
    assert_eq!(fs::read(a.path("r/run.json")).unwrap(), b"second");
    server.requests("");
    pkv_files::refresh(&a.path("r/run.json")).unwrap();
    assert_eq!(server.requests("").len(), 1);
    // A put that was done, whose answer was lost, is no other process's.
    server.fail_next("PUT /b/r/run.json", Fault::LoseAnswer);
    a.write("r/run.json", b"third").unwrap();
    // The same bytes are no change.
    b.write("r/run.json", b"third").unwrap();
    pkv_files::remove_there(&a.path("r/run.json")).unwrap();
    pkv_files::refresh(&b.path("r/run.json")).unwrap();
    assert!(!b.path("r/run.json").exists(), "it was removed");
}

fn what_is_known_by_a_listing_alone_is_brought_once_and_replaced_under_a_condition(server: &Server) {
    let (a, b) = (machine(server), machine(server));
    a.write("r/run.json", b"first").unwrap();
    // Azure's listings have no quotes around a tag, Google's no generation.
    pkv_files::pull(&b.path("r")).unwrap();
    server.requests("");
    pkv_files::pull(&b.path("r")).unwrap();
    assert_eq!(server.requests("GET").len(), 1, "what is the same is not fetched again");
    b.write("r/run.json", b"second").unwrap();
    b.write("r/run.json", b"third").unwrap();
    assert_eq!(server.objects("/b/r/")["run.json"], b"third");
    // What another one has replaced meanwhile stays, also where it is known by a listing alone.
    pkv_files::pull(&a.path("r")).unwrap();
    assert_eq!(fs::read(a.path("r/run.json")).unwrap(), b"third");
    b.write("r/run.json", b"fourth").unwrap();
    assert!(is_changed(&a.write("r/run.json", b"fifth").unwrap_err()));
    assert_eq!(server.objects("/b/r/")["run.json"], b"fourth");
    // One that wrote the same bytes again has replaced nothing.
    pkv_files::refresh(&a.path("r/run.json")).unwrap();
    fs::write(b.path("r/run.json"), b"fourth").unwrap();
    pkv_files::push(&b.path("r/run.json")).unwrap();
    pkv_files::refresh(&a.path("r/run.json")).unwrap();
    a.write("r/run.json", b"fifth").unwrap();
    assert_eq!(server.objects("/b/r/")["run.json"], b"fifth");
}

fn a_claim_that_was_dropped_is_taken_again(server: &Server) {
    let (a, b) = (machine(server), machine(server));
    let name = "r/labels/00001.lock";
    for _ in 0..2 {
        for machine in [&a, &b] {
            let mut claim = Claim::take(&machine.path(name)).unwrap().expect("it was dropped");
            claim.sign("{}").unwrap();
            claim.sign("{\"task\":\"1/2\"}").unwrap();
            drop(claim);
            assert!(server.objects("/b/r/labels/").is_empty());
        }
    }
    // Of one that was removed without its process, no renewal makes another.
    let mut held = Claim::take(&a.path(name)).unwrap().unwrap();
    server.state().objects.clear();
    let _ = held.sign("{}");
    assert!(server.objects("/b/r/labels/").is_empty());
    drop(Claim::take(&b.path(name)).unwrap().expect("it is no process's"));
}

fn a_claim_is_one_machines_until_it_gives_no_sign_of_life(server: &Server) {
    let (a, b) = (machine(server), machine(server));
    let name = "r/labels/00003.lock";
    let mut held = Claim::take(&a.path(name)).unwrap().unwrap();
    held.sign("{\"task\":\"0/2\"}").unwrap();
    let lease = &server.objects("/b/r/labels/")["00003.lock.lease"];
    assert!(String::from_utf8_lossy(lease).contains("\"task\":\"0/2\""));
    assert!(Claim::take(&b.path(name)).unwrap().is_none());
    // It is renewed for as long as its process lives.
    let begun = Instant::now();
    while begun.elapsed() < TERM * 3 / 2 {
        std::thread::sleep(TERM / 8);
        assert!(Claim::take(&b.path(name)).unwrap().is_none());
    }
    drop(held);
    assert!(server.objects("/b/r/labels/").is_empty());
    drop(Claim::wait_for(&b.path(name)).unwrap());
    // A process that died leaves its lease; nothing renews it.
    let dead = r#"{"task":"1/2","lease":{"cache":"elsewhere","pid":1,"boot":"b","id":"x","renewal":0}}"#;
    let put = |server: &Server| {
        let meta = BTreeMap::new();
        let object = Object { content: dead.into(), e_tag: "\"1\"".into(), generation: 1, meta };
        server.state().objects.insert(format!("/b/{name}.lease"), object);
    };
    put(server);
    let begun = Instant::now();
    assert!(Claim::take(&a.path(name)).unwrap().is_none());
    let taken = Claim::wait_for(&a.path(name)).unwrap();
    assert!(begun.elapsed() >= TERM * 9 / 10, "{:?}", begun.elapsed());
    drop(taken);
}

fn a_folder_is_held_alone_or_shared_across_machines(server: &Server) {
    let (a, b) = (machine(server), machine(server));
    let (dir_a, dir_b) = (a.path("r/labels"), b.path("r/labels"));
    let alone = lock_dir(&dir_a).unwrap();
    for other in [lock_dir(&dir_b), share_dir(&dir_b)] {
        let error = other.unwrap_err();
        assert!(error.to_string().contains("another process writes"), "{error:#}");
    }
    drop(alone);
    let shared = [share_dir(&dir_a).unwrap(), share_dir(&dir_b).unwrap()];
    assert!(lock_dir(&dir_a).is_err());
    drop(shared);
    let mut alone = lock_dir(&dir_b).unwrap();
    alone.share().unwrap();
    drop((alone, share_dir(&dir_a).unwrap()));
    assert!(server.objects("/b/").is_empty(), "no claim is left");
}

fn what_was_held_alone_and_lost_is_not_written_any_more(server: &Server) {
    let a = machine(server);
    let _alone = lock_dir(&a.path("r/labels")).unwrap();
    a.write("r/labels/index.json", b"1").unwrap();
    let lease = "/b/r/labels/folder.lock.lease";
    let theirs = Object { content: b"{}".to_vec(), e_tag: "\"another's\"".to_owned(), ..Object::default() };
    server.state().objects.insert(lease.to_owned(), theirs);
    // At the next renewal it is known.
    let mut tries = 0;
    let error = loop {
        match a.write("r/labels/index.json", format!("{tries}").as_bytes()) {
            Err(error) => break error,
            Ok(()) => tries += 1,
        }
        assert!(tries < 1000, "it goes on writing");
        std::thread::sleep(Duration::from_millis(10));
    };
    assert!(format!("{error:#}").contains("taken over"), "{error:#}");
}

fn the_cache_holds_no_more_than_its_limit_and_an_open_shard_stays(server: &Server) {
    let a = machine_with(server, |o| o.cache_bytes = 350_000);
    for n in 0..6 {
        a.write(&format!("r/labels/labels-0000{n}.parquet"), &bytes(100_000, n + 1)).unwrap();
    }
    let here = || {
        let all = fs::read_dir(a.path("r/labels")).unwrap().flatten();
        all.filter(|e| e.file_name().to_string_lossy().ends_with(".parquet")).count()
    };
    assert!(here() <= 3, "{} shards of 100 kB", here());
    let mut open = open_file(&a.path("r/labels/labels-00000.parquet")).unwrap();
    for n in (0..6).chain(0..6) {
        assert!(a.read(&format!("r/labels/labels-0000{n}.parquet")) == bytes(100_000, n + 1), "shard {n}");
        assert!(here() <= 3);
    }
    let mut content = Vec::new();
    open.read_to_end(&mut content).unwrap();
    assert!(content == bytes(100_000, 1));
    assert_eq!(server.objects("/b/r/labels/").len(), 6);
}

fn what_is_written_without_us_is_pushed_and_what_is_removed_goes(server: &Server) {
    let (a, b) = (machine(server), machine(server));
    server.state().page = Some(2);
    fs::create_dir_all(a.path("r/train")).unwrap();
    for (name, text) in
        [("metrics.jsonl", "1\n"), ("a.json", "a"), ("b.tmp", "t"), ("x.lock", ""), ("c.json", "c")]
    {
        fs::write(a.path("r/train").join(name), text).unwrap();
    }
    fs::write(a.path("r/log.jsonl"), "of this machine").unwrap();
    let keys = |server: &Server| server.objects("/b/r/").into_keys().collect::<Vec<_>>();
    pkv_files::push(&a.path("r")).unwrap();
    assert_eq!(keys(server), ["train/a.json", "train/c.json", "train/metrics.jsonl"]);
    server.requests("");
    pkv_files::push(&a.path("r/train")).unwrap();
    assert!(server.requests("").is_empty(), "what is the same is not sent again");
    pkv_files::pull(&b.path("r")).unwrap();
    fs::remove_file(b.path("r/train/a.json")).unwrap();
    fs::write(b.path("r/train/metrics.jsonl"), "1\n2\n").unwrap();
    pkv_files::push(&b.path("r")).unwrap();
    assert_eq!(keys(server), ["train/c.json", "train/metrics.jsonl"]);
    pkv_files::pull(&a.path("r")).unwrap();
    assert_eq!(fs::read_to_string(a.path("r/train/metrics.jsonl")).unwrap(), "1\n2\n");
    assert!(!a.path("r/train/a.json").exists() && a.path("r/log.jsonl").exists());
    pkv_files::remove_there(&a.path("r/train")).unwrap();
    assert!(keys(server).is_empty());
    // What is removed between the listing and its fetch was never there.
    a.write("r/late.json", b"1").unwrap();
    server.fail_next("GET /b/r/late.json", Fault::Status(404));
    pkv_files::pull(&b.path("r")).unwrap();
}

fn bytes_that_were_changed_on_the_way_are_refused(server: &Server) {
    let (a, b) = (machine(server), machine(server));
    a.write("r/labels/labels-00000.parquet", &bytes(5000, 3)).unwrap();
    server.fail_next("GET /b/r/labels/labels-00000.parquet", Fault::Damage);
    let error = open_file(&b.path("r/labels/labels-00000.parquet")).unwrap_err();
    assert!(format!("{error:#}").contains("expected SHA-256"), "{error:#}");
    assert!(!b.path("r/labels/labels-00000.parquet").exists());
    assert!(b.read("r/labels/labels-00000.parquet") == bytes(5000, 3));
}

/// What a sweep writes: `r/labels` is `shared/labels-1`.
const LINKED: &str = "../shared/labels-1";

fn a_shared_folder_is_one_folder_for_all_machines_until_its_link_goes(server: &Server) {
    let (a, b) = (machine(server), machine(server));
    for machine in [&a, &b] {
        fs::remove_dir(machine.path("r/labels")).unwrap();
    }
    fs::create_dir_all(a.path("shared/labels-1")).unwrap();
    pkv_files::link(Path::new(LINKED), &a.path("r/labels")).unwrap();
    a.write("r/labels/index.json", b"1").unwrap();
    a.write("r/labels/labels-00000.parquet", &bytes(5000, 4)).unwrap();
    let keys = |server: &Server| server.objects("/b/").into_keys().collect::<Vec<_>>();
    let all = ["r/labels/shared.link", "shared/labels-1/index.json", "shared/labels-1/labels-00000.parquet"];
    assert_eq!(keys(server), all);
    // Another machine finds it by the run folder or by the stage's.
    pkv_files::pull(&b.path("r/labels")).unwrap();
    assert_eq!(fs::read(b.path("r/labels/index.json")).unwrap(), b"1");
    assert_eq!(fs::read_link(b.path("r/labels")).unwrap(), Path::new(LINKED));
    assert!(b.read("r/labels/labels-00000.parquet") == bytes(5000, 4));
    b.write("r/labels/index.json", b"2").unwrap();
    // A claim by one name is one by the other.
    fs::create_dir_all(a.path("q")).unwrap();
    pkv_files::link(Path::new(LINKED), &a.path("q/labels")).unwrap();
    let held = lock_dir(&a.path("q/labels")).unwrap();
    assert!(lock_dir(&b.path("r/labels")).is_err());
    drop(held);
    pkv_files::push(&a.path("r")).unwrap();
    pkv_files::pull(&a.path("r")).unwrap();
    assert_eq!(fs::read(a.path("q/labels/index.json")).unwrap(), b"2");
    // The link of one run goes, and what it led to stays.
    pkv_files::remove_there(&b.path("r/labels")).unwrap();
    pkv_files::pull(&a.path("r")).unwrap();
    assert!(!a.path("r/labels").exists() && !a.path("r/labels").is_symlink());
    assert_eq!(keys(server)[..2], ["q/labels/shared.link", "shared/labels-1/index.json"]);
    // What is no link of a sweep leads nowhere: out of the bucket, or in a circle.
    for (text, says) in [
        (r#"{"link":"../../../etc/x"}"#, "no link to a shared folder"),
        ("{", "no link to a shared folder"),
        (r#"{"link":"../r/hidden"}"#, "too many links"),
    ] {
        let object =
            Object { content: text.into(), e_tag: "\"9\"".into(), generation: 9, ..Object::default() };
        server.state().objects.insert("/b/r/hidden/shared.link".into(), object);
        let error = pkv_files::pull(&a.path("r")).unwrap_err();
        assert!(format!("{error:#}").contains(says), "{text}: {error:#}");
    }
}

fn a_folder_moves_whole_and_its_shards_keep_their_hashes(server: &Server) {
    let (a, b) = (machine(server), machine(server));
    a.write("r/labels/labels-00000.parquet", &bytes(5000, 5)).unwrap();
    a.write("r/labels/index.json", b"1").unwrap();
    let held = lock_dir(&a.path("r/labels")).unwrap();
    pkv_files::rename_folder(&a.path("r/labels"), &a.path("shared/labels-1")).unwrap();
    drop(held);
    let keys: Vec<String> = server.objects("/b/").into_keys().collect();
    assert_eq!(keys, ["shared/labels-1/index.json", "shared/labels-1/labels-00000.parquet"]);
    assert!(!a.path("r/labels").exists());
    assert_eq!(fs::read(a.path("shared/labels-1/index.json")).unwrap(), b"1");
    a.write("shared/labels-1/index.json", b"2").unwrap();
    // The hash went with it.
    server.fail_next("GET /b/shared/labels-1/labels-00000.parquet", Fault::Damage);
    let error = open_file(&b.path("shared/labels-1/labels-00000.parquet")).unwrap_err();
    assert!(format!("{error:#}").contains("expected SHA-256"), "{error:#}");
    assert!(a.read("shared/labels-1/labels-00000.parquet") == bytes(5000, 5));
}

fn pieces_of_a_stage_are_known_by_one_listing(server: &Server) {
    let (a, b) = (machine(server), machine(server));
    let plan = || PiecesPlan::new("label", &Fingerprint::new().with("choice", 1), 60, 1).unwrap();
    let open = |machine: &Machine, task: &str| {
        let worker = Worker { task: task.parse().unwrap(), device: "cpu".to_owned() };
        Pieces::open(&machine.path("r/labels"), plan(), worker).unwrap().unwrap()
    };
    let done = || Ended { done: 1, ..Ended::default() };
    let first = open(&a, "0/1");
    for shard in 0..20 {
        let Claimed::Free(piece) = first.claim(shard).unwrap() else { panic!("piece {shard}") };
        first.end(piece, done()).unwrap();
    }
    let markers = |requests: &[String]| {
        let is_marker =
            |r: &&String| r.starts_with("GET") && r.contains("/pieces/000") && r.contains(".json");
        requests.iter().filter(is_marker).count()
    };
    server.requests("");
    let second = open(&b, "1/2");
    assert_eq!(second.done(), (0..20).filter(|shard| shard % 2 == 1).collect::<Vec<_>>());
    let requests = server.requests("");
    // Ten of its thirty pieces have a marker, each read as the worker begins and as it counts them.
    assert!(markers(&requests) <= 20, "{requests:#?}");
    assert!(second.markers_read() <= 20, "{}", second.markers_read());
    let state = PiecesState::read(&b.path("r/labels")).unwrap().unwrap();
    assert_eq!((state.markers.len(), state.missing().len()), (20, 40));
    server.requests("");
    // What another machine ends meanwhile is found by the next listing, which alone is asked.
    let Claimed::Free(piece) = first.claim(21).unwrap() else { panic!("piece 21") };
    first.end(piece, done()).unwrap();
    server.requests("");
    assert_eq!(PiecesState::read(&b.path("r/labels")).unwrap().unwrap().markers.len(), 21);
    let requests = server.requests("");
    // Claims are renewed meanwhile.
    let reads = requests.iter().filter(|request| request.starts_with("GET")).count();
    assert_eq!((markers(&requests), reads), (1, 2), "{requests:#?}");
    assert!(matches!(second.claim(21).unwrap(), Claimed::Ended(_)), "it ended since it began");
}

fn a_shard_that_was_kept_in_part_has_its_whole_size_once_it_is_marked(server: &Server) {
    let (a, b) = (machine(server), machine(server));
    fs::create_dir_all(a.path("r/labels/pieces")).unwrap();
    a.write("r/labels/labels-00004.parquet", &bytes(1000, 6)).unwrap();
    a.write("r/labels/pieces/00004.rest.json", b"{}").unwrap();
    pkv_files::pull(&b.path("r/labels")).unwrap();
    assert_eq!(file_len(&b.path("r/labels/labels-00004.parquet")).unwrap(), 1000);
    a.write("r/labels/labels-00004.parquet", &bytes(3000, 6)).unwrap();
    a.write("r/labels/pieces/00004.json", b"{}").unwrap();
    pkv_files::refresh(&b.path("r/labels/pieces/00004.json")).unwrap();
    assert_eq!(file_len(&b.path("r/labels/labels-00004.parquet")).unwrap(), 3000);
}
