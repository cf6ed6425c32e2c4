use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpListener,
};

use super::*;

const SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";

/// A server that answers each request with the next of `answers`, the last one for ever, and never closes a connection.
/// Returns its port, and the number of connections and of requests so far.
async fn serve(answers: &[&str]) -> (u16, Arc<[AtomicUsize; 2]>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let counts: Arc<[AtomicUsize; 2]> = Arc::default();
    let answers: Vec<String> = answers.iter().map(|&text| text.to_owned()).collect();
    let (counted, answers) = (Arc::clone(&counts), Arc::new(answers));
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            counted[0].fetch_add(1, Ordering::SeqCst);
            let (counted, answers) = (Arc::clone(&counted), Arc::clone(&answers));
            tokio::spawn(async move {
                let (mut given, mut piece) = (Vec::new(), [0; 4096]);
                while let Ok(1..) = stream.read(&mut piece).await.inspect(|&n| {
                    given.extend_from_slice(&piece[..n]);
                }) {
                    // Bodies of the tests are `{}`.
                    if given.ends_with(b"\r\n\r\n{}") {
                        given.clear();
                        let at = counted[1].fetch_add(1, Ordering::SeqCst);
                        let answer = answers.get(at).or(answers.last()).unwrap();
                        if stream.write_all(answer.as_bytes()).await.is_err() {
                            return;
                        }
                    }
                }
            });
        }
    });
    (port, counts)
}

fn network(text: &str) -> Network {
    Network::try_from(text.to_owned()).unwrap()
}

fn receiver(url: &str, allow: &[&str]) -> Receiver {
    let secrets = serde_json::from_value(SECRET.into()).unwrap();
    let limits = Limits {
        allow: allow.iter().map(|range| network(range)).collect(),
        timeout: Duration::from_secs(10),
        answer_bytes: 100,
    };
    Receiver::new(url, &secrets, limits).unwrap()
}

async fn post(port: u16) -> Outcome {
    let url = format!("http://127.0.0.1:{port}/hook?key=hidden");
    let receiver = receiver(&url, &["127.0.0.0/8"]);
    receiver.post("m1", Bytes::from_static(b"{}")).await
}

#[tokio::test]
async fn answers_are_done_given_up_or_retried() {
    for (answer, told) in [
        ("200 OK\r\ncontent-length: 2\r\n\r\n{}", "done 200 {}"),
        ("204 No Content\r\n\r\n", "done 204 "),
        (
            "400 Bad\r\ncontent-length: 3\r\n\r\nwhy",
            "give up: the answer is 400 Bad Request",
        ),
        (
            "410 Gone\r\ncontent-length: 0\r\n\r\n",
            "give up: the answer is 410 Gone",
        ),
        (
            "408 Late\r\ncontent-length: 0\r\n\r\n",
            "retry None: the answer is 408 Request Timeout",
        ),
        (
            "429 Slow\r\nretry-after: 7\r\ncontent-length: 0\r\n\r\n",
            "retry Some(7s): the answer is 429 Too Many Requests",
        ),
        (
            "503 Down\r\nretry-after: 99999999\r\ncontent-length: 0\r\n\r\n",
            "retry Some(3600s): the answer is 503 Service Unavailable",
        ),
        (
            "503 Down\r\nretry-after: Sun, 06 Nov 1994 08:49:37 GMT\r\ncontent-length: 0\r\n\r\n",
            "retry Some(0ns): the answer is 503 Service Unavailable",
        ),
        (
            "500 No\r\ncontent-length: 0\r\n\r\n",
            "retry None: the answer is 500 Internal Server Error",
        ),
    ] {
        let (port, _) = serve(&[&format!("HTTP/1.1 {answer}")]).await;
        assert_eq!(shown(post(port).await), told);
    }
}

fn shown(outcome: Outcome) -> String {
    match outcome {
        Outcome::Done { status, body } => {
            format!(
                "done {} {}",
                status.as_u16(),
                String::from_utf8_lossy(&body)
            )
        }
        Outcome::GiveUp(fault) => format!("give up: {fault}"),
        Outcome::Retry { fault, after } => format!("retry {after:?}: {fault}"),
    }
}

#[tokio::test]
async fn connections_are_used_again_also_when_a_body_is_ignored() {
    let answers = ["200 OK", "500 Bad", "200 OK"]
        .map(|status| format!("HTTP/1.1 {status}\r\ncontent-length: 2\r\n\r\n{{}}"));
    let answers: Vec<&str> = answers.iter().map(String::as_str).collect();
    let (port, counts) = serve(&answers).await;
    let receiver = receiver(&format!("http://localhost:{port}/"), &["127.0.0.1", "::1"]);
    for _ in 0..3 {
        receiver.post("m1", Bytes::from_static(b"{}")).await;
    }
    assert_eq!(counts[1].load(Ordering::SeqCst), 3);
    assert_eq!(counts[0].load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn a_redirect_is_not_followed() {
    let (inner, counts) = serve(&["HTTP/1.1 204 No Content\r\n\r\n"]).await;
    for status in [301, 302, 303, 307, 308] {
        let answer = format!(
            "HTTP/1.1 {status} Moved\r\nlocation: http://127.0.0.1:{inner}/\r\ncontent-length: 0\r\n\r\n"
        );
        let (port, _) = serve(&[&answer]).await;
        let told = shown(post(port).await);
        assert!(
            told.starts_with(&format!("retry None: the answer is {status}")),
            "{told}"
        );
    }
    assert_eq!(counts[0].load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn a_large_answer_is_given_up() {
    let sized = format!(
        "HTTP/1.1 200 OK\r\ncontent-length: 101\r\n\r\n{}",
        "a".repeat(101)
    );
    let chunk = format!("20\r\n{}\r\n", "a".repeat(32));
    let endless = format!(
        "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n{}",
        chunk.repeat(40)
    );
    for answer in [sized, endless] {
        let (port, _) = serve(&[&answer]).await;
        let told = shown(post(port).await);
        assert_eq!(told, "give up: the answer is larger than 100 bytes");
    }
}

#[tokio::test]
async fn an_answer_that_does_not_end_is_a_timeout() {
    for answer in ["", "HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nab"] {
        let (port, _) = serve(&[answer]).await;
        let url = format!("http://127.0.0.1:{port}/");
        let mut receiver = receiver(&url, &["127.0.0.1"]);
        receiver.client.timeout = Duration::from_millis(50);
        let outcome = receiver.post("m1", Bytes::from_static(b"{}")).await;
        assert_eq!(shown(outcome), "retry None: no answer within 50ms");
    }
}

#[tokio::test]
async fn an_address_that_is_not_public_is_refused_whatever_its_spelling() {
    let (port, counts) = serve(&["HTTP/1.1 204 No Content\r\n\r\n"]).await;
    for host in [
        "127.0.0.1",
        "localhost",
        "[::1]",
        "[::ffff:127.0.0.1]",
        "2130706433",
        "0x7f.1",
        "0.0.0.0",
    ] {
        for scheme in ["http", "https"] {
            let url = format!("{scheme}://{host}:{port}/hook?key=hidden");
            let receiver = receiver(&url, &["10.0.0.0/8"]);
            let told = shown(receiver.post("m1", Bytes::from_static(b"{}")).await);
            assert!(told.contains("which is not public"), "{url}: {told}");
            assert!(!told.contains("hidden"), "{told}");
        }
    }
    assert_eq!(counts[0].load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn a_failure_says_its_cause_and_no_secret() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    drop(listener);
    let told = shown(post(port).await);
    assert!(
        told.starts_with("retry None: ") && told.contains("refused"),
        "{told}"
    );
    assert!(!told.contains("hidden"), "{told}");
    let shown = format!("{:?}", receiver("https://example.org", &[]));
    assert!(!shown.contains("MfKQ"), "{shown}");
}

#[test]
fn pauses_are_doubled_up_to_the_longest() {
    let bounds = (Duration::from_secs(1), Duration::from_secs(60));
    for (attempt, whole) in [(0, 1), (1, 1), (2, 2), (3, 4), (6, 32), (7, 60), (1000, 60)] {
        let whole = Duration::from_secs(whole);
        let pause = pause(attempt, bounds, None);
        assert!(whole / 2 <= pause && pause <= whole, "{attempt}: {pause:?}");
    }
    let asked = Duration::from_secs(90);
    assert_eq!(pause(1, bounds, Some(asked)), asked);
}

#[tokio::test]
async fn an_answer_that_breaks_off_is_retried() {
    let answers = [
        "",
        "HTTP/1.1 200 OK\r\ncontent-le",
        "HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nab",
        "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nab\r\n",
        "220 mail.example.org ESMTP\r\n",
    ];
    for answer in answers {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        tokio::spawn(async move {
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut given = [0; 4096];
                let read = stream.read(&mut given).await.unwrap();
                assert!(read > 0);
                stream.write_all(answer.as_bytes()).await.unwrap();
            }
        });
        let told = shown(post(port).await);
        assert!(told.starts_with("retry None: "), "{answer:?}: {told}");
        assert!(!told.contains("hidden"), "{told}");
    }
}

#[tokio::test]
async fn a_handshake_that_does_not_go_on_is_a_timeout() {
    // It accepts connections, and says nothing.
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let url = format!("https://127.0.0.1:{port}/").parse().unwrap();
    let mut connector = Connector::new(
        tls(&[]).unwrap(),
        [network("127.0.0.1")].into(),
        Duration::from_millis(50),
    );
    let failed = tower_service::Service::call(&mut connector, url).await;
    let failed = failed.err().unwrap();
    assert_eq!(failed.kind(), io::ErrorKind::TimedOut);
}
