//! `statera weights` at its limits: a command that cannot do all of its work says so and changes nothing.

use crate::support::Operator;

const A: &str = "10.0.0.1:80";
const B: &str = "10.0.0.2:80";

#[tokio::test]
async fn without_the_key_of_known_weights_nothing_is_rolled_back() {
    let operator = Operator::start().await;
    operator.redis.run(&format!("ZADD servers 1 {A} 1 {B}")).await;
    operator.done(&format!("set web {A}=2")).await;
    for (lost, weight) in [("DEL {servers}:known", 3), ("ZADD {servers}:known 9 10.0.0.9:80", 4)] {
        operator.redis.run(lost).await;
        let before = operator.table().await;
        for words in ["rollback web", "rollback web 0"] {
            let back = operator.weights(words).await;
            assert!(back.code == Some(1) && back.stderr.contains("was lost"), "{words}: {back:?}");
        }
        assert_eq!(operator.table().await, before);
        operator.done(&format!("set web {B}={weight}")).await;
        let back = operator.weights("rollback web 0").await;
        assert!(back.code == Some(1) && back.stderr.contains("was lost"), "{back:?}");
        // Later changes can be undone.
        operator.done("rollback web").await;
        assert_eq!(operator.table().await, before);
    }
    operator.done("history web").await;
}

#[tokio::test]
async fn a_table_too_large_to_be_read_is_not_made() {
    let operator = Operator::start().await;
    let fill = "for i = 1, 100000 do redis.call('ZADD', KEYS[1], 1, 'a' .. i .. '.example:80') end";
    operator.redis.run_words(&["EVAL", fill, "1", "servers"]).await;
    let more = operator.weights(&format!("set web {A}=1")).await;
    assert_eq!(more.code, Some(1));
    assert!(more.stderr.contains("would have more than 100000 members: split the pool"), "{}", more.stderr);
    operator.done("set web a1.example:80=2").await;
    operator.done("remove web a2.example:80").await;
}
