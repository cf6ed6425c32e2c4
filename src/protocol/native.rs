//! `natter.v1`: JSON text frames.
