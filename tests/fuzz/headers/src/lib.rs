//! As much of async-nats as `bus/record.rs` names, so that the fuzzer need not build its hundred dependencies. The functions
//! that take these are not fuzzed.

pub struct HeaderMap(Vec<(String, Vec<HeaderValue>)>);

pub struct HeaderValue(String);

impl HeaderMap {
    pub fn iter(&self) -> impl Iterator<Item = (&String, &Vec<HeaderValue>)> {
        self.0.iter().map(|(name, values)| (name, values))
    }

    pub fn get_last(&self, name: &str) -> Option<&HeaderValue> {
        let (_, values) = self.0.iter().find(|(found, _)| found == name)?;
        values.last()
    }
}

impl HeaderValue {
    pub fn as_str(&self) -> &str {
        &self.0
    }
}
