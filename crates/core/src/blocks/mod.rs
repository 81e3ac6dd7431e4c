//! Formats whose guest data lies in blocks of one size at the places that one flat table says: a layer and its writer, once for all of
//! them. A format gives its [`Layout`] and a [`Scheme`]: what is special.
//!
//! A place is what one block takes in the file: the guest's bytes, behind those that the format keeps in front of them. New places are
//! where nothing refers to, first inside the file, then behind its end, and read as zeroes before they have a block. A block keeps its
//! place for ever: zeroes and discards give back the space of the file below it.
//!
//! What is written, and in which order: data goes to its place at once, and an entry of the table that is new stays in memory until the
//! next flush. That one makes the data durable, with what the format wants in front of its entries ([`Scheme::settle`]), then writes the
//! entries, with the bits of new sectors of a differencing image, and makes them durable. A power cut leaves at worst places that nothing refers to, which are given out again. A flush without
//! new blocks is one sync.

mod bitmaps;
mod check;
mod child;
mod fields;
mod layer;
mod layout;
mod new;
mod places;
mod table;
mod write;

pub use bitmaps::SectorBitmaps;
pub use check::UsedPlaces;
pub use fields::{Fields, put};
pub use layer::BlockLayer;
pub use layout::{Entry, Layout, OpenOptions, Scheme};
pub use new::{Blueprint, NewBlocks};
