//! What mirrors say to their origins, as a client in between hears it.

use futures_util::StreamExt as _;
use natter::testing::subject::api;
use serde_json::Value;

use super::LONG;

/// What the mirrors of a region ask their origins, and what is answered.
pub(crate) struct Overheard {
    requests: async_nats::Subscriber,
    answers: async_nats::Subscriber,
}

impl Overheard {
    /// Over a connection that may listen to it.
    pub(crate) async fn listen(client: &async_nats::Client) -> Self {
        let requests = client.subscribe(api::CONSUMER_REQUESTS).await.unwrap();
        let answers = client.subscribe(api::CONSUMER_ANSWERS).await.unwrap();
        Self { requests, answers }
    }

    /// Waits until a mirror of rooms asks for a consumer; where the answer is to go.
    pub(crate) async fn asked(&mut self) -> async_nats::Subject {
        let of_rooms = async {
            loop {
                let request = self.requests.next().await.unwrap();
                if request.subject.contains("ROOMS_") {
                    return request.reply.unwrap();
                }
            }
        };
        tokio::time::timeout(LONG, of_rooms).await.unwrap()
    }

    /// Waits until that is answered, without an error.
    pub(crate) async fn answered(&mut self, reply: &async_nats::Subject) {
        let its_own = async {
            loop {
                let answer = self.answers.next().await.unwrap();
                if answer.subject == *reply {
                    return answer;
                }
            }
        };
        let answer = tokio::time::timeout(LONG, its_own).await.unwrap();
        let answer: Value = serde_json::from_slice(&answer.payload).unwrap();
        assert!(answer["error"].is_null(), "{answer}");
    }
}
