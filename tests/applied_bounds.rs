//! The key of reports, `{servers}:applied`: whatever it holds, a report takes Redis a bounded time, and
//! reports whose lease has ended are removed step by step.

use redis::Value;

use crate::support::{Operator, Program, Redis, calls, eventually};

const A: &str = "10.0.0.1:80";
const KEY: &str = "{servers}:applied";

/// Writes the fields of `count` proxies. Their leases end at `ends`, and their names and reports are
/// `length` bytes long.
async fn add_reports(redis: &Redis, count: u32, ends: u64, length: u32) {
    const PIECE: u32 = 20_000;
    let fill = "local text = string.rep('x', tonumber(ARGV[4])) \
                for i = tonumber(ARGV[1]), tonumber(ARGV[2]) do \
                redis.call('HSET', KEYS[1], 'edge/' .. i .. '/' .. text, ARGV[3] .. ' ' .. text) end";
    for first in (1..=count).step_by(PIECE as usize) {
        let last = count.min(first + PIECE - 1);
        let numbers = [u64::from(first), u64::from(last), ends, u64::from(length)].map(|n| n.to_string());
        let words = ["EVAL", fill, "1", KEY].into_iter().chain(numbers.iter().map(String::as_str));
        redis.run_words(&words.collect::<Vec<_>>()).await;
    }
}

async fn fields(redis: &Redis) -> i64 {
    let Value::Int(count) = redis.run(&format!("HLEN {KEY}")).await else { panic!("no number") };
    count
}

/// Writes a new table. Proxies report each one that they have not reported before.
async fn change(operator: &Operator) {
    let weight = fastrand::u32(..);
    operator.redis.run(&format!("ZADD servers {weight} {A}")).await;
}

#[tokio::test]
async fn a_report_reads_a_bounded_number_of_fields_beside_hundreds_of_thousands_of_leases() {
    const MOST_SCANS: u64 = 500;
    let operator = Operator::start().await;
    for ends in [1_000, 99_999_999_999_999] {
        operator.redis.run(&format!("DEL {KEY}")).await;
        add_reports(&operator.redis, 200_000, ends, 4).await;
        operator.redis.run("CONFIG RESETSTAT").await;
        let _program = Program::run(&operator.yaml(""));
        eventually("it reports a few times", || async {
            change(&operator).await;
            calls(&operator.redis, "pexpire").await >= 4
        })
        .await;
        let (reports, scans) =
            (calls(&operator.redis, "pexpire").await, calls(&operator.redis, "hscan").await);
        assert!(scans > 0 && scans <= reports * MOST_SCANS, "{scans} scans for {reports} reports");
        assert_eq!(calls(&operator.redis, "hgetall").await, 0);
        assert!(fields(&operator.redis).await > 150_000);

        // Then it cannot be said which proxies have the table. That answer is cheap too.
        let set = operator.weights(&format!("set web {A}=1 --wait=20s")).await;
        assert!(
            set.code == Some(1) && set.stderr.contains("is written, but which proxies use it is unknown"),
            "{set:?}"
        );
        assert!(
            set.stderr.contains(&format!("{KEY} holds more than statera writes there: delete it")),
            "{set:?}"
        );
        operator.redis.run(&format!("DEL {KEY}")).await;
        let set = operator.weights(&format!("set web {A}=2 --wait=20s")).await;
        assert!(set.stdout.ends_with("applied by 1 proxy\n"), "{set:?}");
    }
}

#[tokio::test]
async fn leases_that_have_ended_and_values_that_are_no_leases_are_removed_step_by_step() {
    let operator = Operator::start().await;
    add_reports(&operator.redis, 1_500, 1_000, 4).await;
    // Fields that no proxy writes: the name or the report is too long, or the value is no lease.
    add_reports(&operator.redis, 3, 99_999_999_999_999, 1 << 20).await;
    operator
        .redis
        .run_words(&["HSET", KEY, "a", "", "b", "x", "c", "-1 x", "d", "1e99 y", "e", "5 a b"])
        .await;
    let _program = Program::run(&operator.yaml(""));
    eventually("only its own report and two fields of no proxy are left", || async {
        change(&operator).await;
        fields(&operator.redis).await == 3
    })
    .await;
    let set = operator.weights(&format!("set web {A}=1 --wait=20s")).await;
    assert!(set.code == Some(0) && set.stdout.ends_with("applied by 1 proxy\n"), "{set:?}");
}

/// HSCAN refuses a number that cannot be a cursor.
#[tokio::test]
async fn a_cursor_that_no_scan_returns_does_not_stop_the_cleaning() {
    let operator = Operator::start().await;
    add_reports(&operator.redis, 100, 1_000, 4).await;
    operator.redis.run_words(&["HSET", KEY, "cleaned", "0/99999999999999999999999"]).await;
    let _program = Program::run(&operator.yaml(""));
    eventually("only its own report and two fields of no proxy are left", || async {
        change(&operator).await;
        fields(&operator.redis).await == 3
    })
    .await;
}

/// The example config of an earlier version granted these rights, without HSCAN.
#[tokio::test]
async fn a_proxy_without_the_right_to_scan_the_reports_reports_all_the_same() {
    let operator = Operator::start().await;
    operator.redis.run(&format!("ZADD servers 1 {A}")).await;
    let seen = "~{servers}:applied +eval +time +hset +hdel +hgetall +pexpire";
    operator.redis.grant_to("proxy", &format!("{} {seen}", crate::support::LEAST_RIGHTS)).await;
    let _program = Program::run(&operator.yaml("username: proxy, password: secret,"));
    let set = operator.weights(&format!("set web {A}=2 --wait=20s")).await;
    assert!(set.code == Some(0) && set.stdout.ends_with("applied by 1 proxy\n"), "{set:?}");
}
