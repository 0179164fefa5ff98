//! Computes which of a cluster's 16,384 slots a key belongs to.
//!
//! By the cluster specification: CRC16 (XMODEM) of the hash tag, or of the whole key where there is none.

use crate::config::hash_tag;

const SLOTS: u16 = 16_384;
const POLYNOMIAL: u16 = 0x1021;

pub(super) fn slot_of(key: &str) -> u16 {
    crc16(hash_tag(key).unwrap_or(key).as_bytes()) % SLOTS
}

fn crc16(bytes: &[u8]) -> u16 {
    bytes.iter().fold(0, |crc, byte| {
        (0..8).fold(crc ^ u16::from(*byte) << 8, |crc, _| {
            let shifted = crc << 1;
            if crc & 0x8000 == 0 { shifted } else { shifted ^ POLYNOMIAL }
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_those_of_redis() {
        assert_eq!(crc16(b"123456789"), 0x31C3);
        // The answers of CLUSTER KEYSLOT.
        for (key, slot) in [("servers", 11335), ("foo", 12182), ("{foo}:version", 12182), ("", 0)] {
            assert_eq!(slot_of(key), slot, "{key}");
        }
        assert_eq!(slot_of("statera:{web}:weights"), slot_of("web"));
        assert_ne!(slot_of("a{}b"), slot_of(""));
    }
}
