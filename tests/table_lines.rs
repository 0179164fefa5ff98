//! Log lines about a pool's table: each change, and when no backend or only one is left.

use serde_json::{Value, json};
use tokio::time::Instant;

use crate::support::{Operator, Program, eventually, greeting, text};

/// Starts a program on the operator's table and waits until it has read the table.
async fn follower(operator: &Operator) -> Program {
    let program = Program::run(&operator.yaml("watch: notifications, resync_interval: 1h,"));
    program.says("weights loaded from redis: ").await;
    program
}

/// The fields of all lines "weights changed".
fn changes(program: &Program) -> Vec<[String; 3]> {
    let lines = program.messages("weights changed");
    lines.iter().map(|line| ["changed", "joined", "left"].map(|field| text(line, field).to_owned())).collect()
}

fn change(changed: &str, joined: &str, left: &str) -> [String; 3] {
    [changed, joined, left].map(str::to_owned)
}

#[tokio::test]
async fn each_change_of_the_table_is_logged_with_old_and_new_weights_also_if_it_is_reverted() {
    let operator = Operator::start().await;
    operator.redis.run("ZADD servers 5 10.0.0.1:80 5 10.0.0.2:80 5 10.0.0.3:80").await;
    let program = follower(&operator).await;
    let line = program.messages("weights loaded from redis: 3 backends");
    assert_eq!(line.len(), 1, "{}", program.log());
    let mut wanted = Vec::new();
    for (command, line) in [
        ("ZADD servers 0 10.0.0.1:80", change("10.0.0.1:80 5 -> 0", "", "")),
        ("ZADD servers 5 10.0.0.1:80", change("10.0.0.1:80 0 -> 5", "", "")),
        ("ZADD servers 7.5 10.0.0.4:80 1 10.0.0.2:80", change("10.0.0.2:80 5 -> 1", "10.0.0.4:80 7.5", "")),
        ("ZREM servers 10.0.0.3:80", change("", "", "10.0.0.3:80 5")),
    ] {
        operator.redis.run(command).await;
        wanted.push(line);
        eventually(command, || async { changes(&program).len() == wanted.len() }).await;
    }
    assert_eq!(changes(&program), wanted);
    let versions: Vec<_> =
        program.messages("weights changed").iter().map(|line| line["version"].as_u64()).collect();
    assert!(versions.is_sorted() && versions.iter().all(Option::is_some), "{versions:?}");
}

#[tokio::test]
async fn a_change_that_is_reverted_at_once_is_in_the_log_and_not_in_the_history() {
    let operator = Operator::start().await;
    operator.done("set web 10.0.0.1:80=5 10.0.0.2:80=5").await;
    let program = follower(&operator).await;
    for (number, weight) in [(1, 0), (2, 5)] {
        operator.redis.run(&format!("ZADD servers {weight} 10.0.0.1:80")).await;
        eventually("it is logged", || async { changes(&program).len() == number }).await;
    }
    let there_and_back = ["10.0.0.1:80 5 -> 0", "10.0.0.1:80 0 -> 5"].map(|text| change(text, "", ""));
    assert_eq!(changes(&program), there_and_back);
    let history = operator.json("history web").await;
    assert_eq!(history["entries"].as_array().expect("a list").len(), 1, "{history}");
}

#[tokio::test]
async fn drain_and_maint_are_logged_when_they_are_set_and_when_they_end() {
    let operator = Operator::start().await;
    operator.redis.run("ZADD servers 5 10.0.0.1:80 5 10.0.0.2:80 5 10.0.0.3:80").await;
    let program = follower(&operator).await;
    for (number, (words, states)) in [
        ("drain web 10.0.0.1:80", "10.0.0.1:80 ready -> drain"),
        ("maint web 10.0.0.1:80 10.0.0.2:80", "10.0.0.1:80 drain -> maint, 10.0.0.2:80 ready -> maint"),
        ("ready web 10.0.0.1:80", "10.0.0.1:80 maint -> ready"),
    ]
    .into_iter()
    .enumerate()
    {
        operator.done(words).await;
        eventually(words, || async { program.messages("drain or maint changed").len() == number + 1 }).await;
        let line = program.messages("drain or maint changed").remove(number);
        assert_eq!((text(&line, "states"), text(&line, "level")), (states, "INFO"), "{line}");
    }
    assert_eq!(changes(&program), [[""; 3]; 0]);
}

#[tokio::test]
async fn zero_weights_and_a_single_usable_backend_are_logged_and_so_is_their_end() {
    let operator = Operator::start().await;
    operator.redis.run("ZADD servers 5 10.0.0.1:80 5 10.0.0.2:80").await;
    let program = follower(&operator).await;
    program.address().await;
    operator.redis.run("ZADD servers 0 10.0.0.1:80").await;
    let line = program.says("one backend is left: ").await;
    assert_eq!(
        (text(&line, "level"), text(&line, "backend"), &line["members"]),
        ("WARN", "10.0.0.2:80", &json!(2))
    );
    operator.redis.run("ZADD servers 0 10.0.0.2:80").await;
    let line = program.says("sessions are refused: all weights are 0").await;
    assert_eq!(text(&line, "level"), "WARN");
    greeting(program.address().await).await.expect_err("it is refused");
    operator.redis.run("ZADD servers 1 10.0.0.1:80 1 10.0.0.2:80").await;
    let line = program.says("sessions are accepted again: 2 of 2 backends get sessions").await;
    assert_eq!(text(&line, "level"), "INFO");

    // Sessions are also refused if no backend is ready.
    operator.done("drain web 10.0.0.1:80 10.0.0.2:80").await;
    program.says("sessions are refused: all backends with a weight are in drain or maint").await;
}

#[tokio::test]
async fn a_flood_of_changes_writes_few_lines_and_the_last_one_has_the_final_weight() {
    let operator = Operator::start().await;
    operator.redis.run("ZADD servers 1 10.0.0.1:80 1 10.0.0.2:80").await;
    let program = follower(&operator).await;
    let begun = Instant::now();
    let propagated = |version: u64| {
        let line = program.messages("weights changed").pop();
        line.is_some_and(|line| line["version"].as_u64() >= Some(version))
    };
    for weight in 2..300 {
        operator.redis.run(&format!("ZADD servers {weight} 10.0.0.1:80")).await;
    }
    let end = |line: &Value| text(line, "changed").ends_with("-> 299");
    eventually("the end is logged", || async { program.messages("weights changed").last().is_some_and(end) })
        .await;
    let lines = program.messages("weights changed");
    // At most ten lines are written in each window of ten seconds.
    let most = 10 * (begun.elapsed().as_secs() as usize / 10 + 2);
    assert!(lines.len() <= most && propagated(2), "{} lines", lines.len());
    assert!(lines.iter().any(|line| line["held_back"].as_u64() > Some(0)), "{lines:?}");
}
