//! A table is read as it was written, and any other text is refused.

use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::balance::Balance;
use crate::balance::backend::Registry;
use crate::balance::snapshot::{Origin, Snapshot};

const POOL: &str = "web";
const KEY: &str = "servers";

fn time() -> SystemTime {
    UNIX_EPOCH + Duration::from_millis(1_767_323_045_678)
}

fn encoded(pool: &str, key: &str, table: &Table) -> String {
    let snapshot = Snapshot::new(1, Origin::Redis, table, Balance::WeightedRandom, &Registry::new(1));
    encode(pool, key, time(), snapshot.members())
}

fn some() -> Table {
    Table::of(&[("10.0.0.1:80", 100.0), ("db.internal:5432", 0.0), ("unix:/run/web.sock", 0.5)])
}

/// A file with this content and the right checksum.
fn sealed(content: &str) -> Vec<u8> {
    format!("{content}crc32 {:08x}\n", crc32fast::hash(content.as_bytes())).into_bytes()
}

fn refusal(bytes: &[u8]) -> String {
    decode(bytes, POOL, KEY).expect_err("a refusal").to_string()
}

#[test]
fn the_format_has_not_changed() {
    let text = encoded(POOL, KEY, &some());
    assert_eq!(
        text,
        "statera table 1\npool web\nweights_key servers\ntime 2026-01-02T03:04:05.678Z\nmembers 3\n\
         100.0 10.0.0.1:80\n0.5 unix:/run/web.sock\n0.0 db.internal:5432\ncrc32 bef3c5ad\n"
    );
    let saved = decode(text.as_bytes(), POOL, KEY).expect("it is whole");
    assert_eq!(saved, Saved { table: some(), time: time() });
}

#[test]
fn a_member_in_drain_or_maint_is_still_so_after_a_restart() {
    let states = [("10.0.0.1:80", AdminState::Drain), ("db.internal:5432", AdminState::Maint)];
    let states = states.map(|(id, state)| (id.parse().expect("an address"), state));
    let table = some().with_states(states.into());
    let text = encoded(POOL, KEY, &table);
    assert!(
        text.contains("\ndrain 100.0 10.0.0.1:80\n") && text.contains("\nmaint 0.0 db.internal:5432\n"),
        "{text}"
    );
    assert_eq!(decode(text.as_bytes(), POOL, KEY).expect("it is whole").table, table);
}

#[test]
fn an_empty_table_is_valid() {
    let empty = Table::default();
    let text = encoded(POOL, KEY, &empty);
    assert_eq!(decode(text.as_bytes(), POOL, KEY).expect("it is whole").table, empty);
}

#[test]
fn a_file_that_is_cut_at_any_byte_is_refused() {
    let text = encoded(POOL, KEY, &some());
    for length in 0..text.len() {
        let refused = decode(&text.as_bytes()[..length], POOL, KEY);
        assert!(matches!(refused, Err(Unusable::CutShort)), "cut to {length}: {refused:?}");
    }
}

#[test]
fn a_file_with_any_byte_changed_or_added_is_refused() {
    let text = encoded(POOL, KEY, &some()).into_bytes();
    for at in 0..text.len() {
        for change in 1..=255u8 {
            let mut damaged = text.clone();
            damaged[at] ^= change;
            assert!(decode(&damaged, POOL, KEY).is_err(), "byte {at} xor {change}");
        }
    }
    for more in ["\n", "x", "crc32 00000000\n"] {
        assert!(decode(&[text.as_slice(), more.as_bytes()].concat(), POOL, KEY).is_err(), "{more:?} added");
    }
    let zeroes = vec![0; text.len()];
    assert!(matches!(decode(&zeroes, POOL, KEY), Err(Unusable::Foreign)), "a file system's hole");
}

#[test]
fn the_file_of_another_pool_key_or_version_is_refused_by_name() {
    let text = encoded("api", KEY, &some());
    assert_eq!(refusal(text.as_bytes()), "it is of the pool api");
    let text = encoded(POOL, "a key\u{202e} of\nothers", &some());
    assert_eq!(refusal(text.as_bytes()), r"it is of the weights_key a key\u{202e} of\nothers");
    assert!(decode(text.as_bytes(), POOL, "a key\u{202e} of\nothers").is_ok(), "the right key");
    let text = encoded(POOL, KEY, &some()).replace("statera table 1\n", "statera table 2\n");
    assert_eq!(refusal(text.as_bytes()), "its format has version 2, and this Statera knows 1");
    assert_eq!(refusal(b"#!/bin/sh\n"), "it is not a table that Statera saved");
}

#[test]
fn impossible_content_is_refused_even_with_the_right_checksum() {
    let head = "statera table 1\npool web\nweights_key servers\ntime 2026-01-02T03:04:05.678Z\n";
    for (members, reason) in [
        ("members 1\n-1.0 10.0.0.1:80\n", "line 6: -1 is not a weight"),
        ("members 1\ninf 10.0.0.1:80\n", "line 6: inf is not a weight"),
        ("members 1\n1.0 10.0.0.1\n", "line 6: it has no port"),
        ("members 1\n10.0.0.1:80\n", "line 6: a weight and a member are needed"),
        ("members 1\n\n", "line 6: a weight and a member are needed"),
        ("members 2\n1.0 10.0.0.1:80\n", "the file should have 2 different members"),
        ("members 2\n1.0 10.0.0.1:80\n2.0 10.0.0.1:80\n", "the file should have 2 different members"),
        ("members 0\n1.0 10.0.0.1:80\n", "the file should have 0 different members"),
        ("members 18446744073709551615\n", "18446744073709551615 different members"),
        ("members all\n", "line 5: this is not a number"),
        ("", "line 5: \"members\" is missing"),
    ] {
        let refused = refusal(&sealed(&format!("{head}{members}")));
        assert!(refused.contains(reason), "{members:?}: {refused}");
    }
    let timeless = format!("{}members 0\n", head.replace("2026", "never"));
    assert_eq!(refusal(&sealed(&timeless)), "line 4: this is not a time");
    assert!(refusal(&sealed("statera table 1\n\u{ff}\n")).contains("\"pool\" is missing"));
}

proptest! {
    #[test]
    fn every_table_reads_as_it_was_written(
        weights in prop::collection::vec(prop_oneof![Just(0.0), 0.0..1e308, Just(5e-324), Just(f64::MAX)], 0..40),
        pool in "\\PC{0,64}", key in any::<String>()
    ) {
        let member = |(i, weight): (usize, &f64)| {
            (format!("10.0.0.{i}:80").parse().expect("an address"), Weight::new(*weight).expect("a weight"))
        };
        let table = Table::new(weights.iter().enumerate().map(member).collect());
        let text = encoded(&pool, &key, &table);
        prop_assert_eq!(decode(text.as_bytes(), &pool, &key).expect("it is whole").table, table);
    }

    #[test]
    fn no_content_makes_the_reader_panic(
        bytes in prop::collection::vec(any::<u8>(), 0..300), sealing in any::<bool>()
    ) {
        let text = format!("statera table 1\n{}", String::from_utf8_lossy(&bytes));
        let bytes = if sealing { sealed(&text) } else { bytes };
        if let Err(unusable) = decode(&bytes, POOL, KEY) {
            prop_assert!(!unusable.to_string().chars().any(char::is_control));
        }
    }
}
