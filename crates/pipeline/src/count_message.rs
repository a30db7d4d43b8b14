//! What a rank says in the count exchange.

use epsmoe_plan::{Feedback, PlanError, TokenHistograms};

/// A rank's counts, behind a digest of everything else that a plan depends on.
///
/// Encoded: digest (8 bytes), number of batches (8), counts of each, then feedback, if there is any.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct CountMessage {
    pub(crate) digest: u64,
    /// Of each batch.
    pub(crate) counts: Vec<TokenHistograms>,
    pub(crate) feedback: Option<Feedback>,
}

/// Bytes before the counts.
const HEAD: usize = 16;

impl CountMessage {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let head = [self.digest, self.counts.len() as u64].into_iter().flat_map(u64::to_le_bytes);
        let counts = self.counts.iter().flat_map(TokenHistograms::encode);
        head.chain(counts).chain(self.feedback.iter().flat_map(Feedback::encode)).collect()
    }

    /// What is before and behind the counts in this message, which `bytes` is.
    pub(crate) fn around_counts<'a>(&self, bytes: &'a [u8], slots: usize) -> (&'a [u8], &'a [u8]) {
        let counts = HEAD..HEAD + self.counts.len() * TokenHistograms::encoded_len(slots);
        (&bytes[..counts.start], &bytes[counts.end..])
    }

    /// The digest of a message that may have come from another model.
    pub(crate) fn digest_of(message: &[u8]) -> Option<u64> {
        message.first_chunk().map(|&digest| u64::from_le_bytes(digest))
    }

    /// Reads the message of a rank with the same digest, for a layer of `slots` (S).
    pub(crate) fn decode(message: &[u8], slots: usize) -> Result<Self, PlanError> {
        let want = TokenHistograms::encoded_len(slots);
        let short = PlanError::CountsLength { got: message.len(), want, slots };
        let (words, rest) = message.split_at_checked(HEAD).ok_or(short.clone())?;
        let word = |at: usize| words[at..].first_chunk().map_or(0, |&word| u64::from_le_bytes(word));
        let batches = usize::try_from(word(8)).ok().and_then(|batches| batches.checked_mul(want));
        let (counts, feedback) = batches.and_then(|bytes| rest.split_at_checked(bytes)).ok_or(short)?;
        Ok(CountMessage {
            digest: word(0),
            counts: counts
                .chunks(want)
                .map(|counts| TokenHistograms::decode(counts, slots))
                .collect::<Result<_, _>>()?,
            feedback: Feedback::decode(feedback),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use epsmoe_plan::PredictedMeasured;

    #[test]
    fn messages_come_back() {
        let counts = |tokens| TokenHistograms {
            tokens,
            assignments: vec![tokens, 0],
            first: vec![tokens, 0],
            last: vec![tokens, 0],
        };
        let look = PredictedMeasured { predicted_ns: 1, measured_ns: 2 };
        let feedback = Some(Feedback { link: look, ..Feedback::default() });
        for counts in [vec![], vec![counts(3)], vec![counts(3), counts(4)]] {
            for feedback in [None, feedback] {
                let message = CountMessage { digest: u64::MAX - 1, counts: counts.clone(), feedback };
                let bytes = message.encode();
                assert_eq!(CountMessage::decode(&bytes, 2).unwrap(), message);
                assert_eq!(CountMessage::digest_of(&bytes), Some(message.digest));
            }
        }
        let whole = CountMessage { digest: 1, counts: vec![counts(3)], feedback: None }.encode();
        for short in [0, 7, 15, 16, whole.len() - 1] {
            assert!(CountMessage::decode(&whole[..short], 2).is_err(), "{short} bytes");
        }
        let mut many = whole;
        many[8..16].copy_from_slice(&u64::MAX.to_le_bytes());
        assert!(CountMessage::decode(&many, 2).is_err());
    }
}
