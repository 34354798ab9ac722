//! Map of the entries of one directory, by name. Pure.

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Maximum number of entries in a vector.
const FEW: usize = 32;

/// Entries by name, sorted by name.
///
/// A few entries are in a vector without spare capacity, which saves memory: most directories of a deep tree have one
/// entry, and the first node of a `BTreeMap` has room for eleven. More entries are in a map, where insertion is fast.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Children<V> {
    Few(Vec<(Box<str>, V)>),
    Many(BTreeMap<Box<str>, V>),
}

impl<V> Default for Children<V> {
    fn default() -> Self {
        Self::Few(Vec::new())
    }
}

impl<V> Children<V> {
    pub(super) fn len(&self) -> usize {
        match self {
            Self::Few(few) => few.len(),
            Self::Many(many) => many.len(),
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub(super) fn get(&self, name: &str) -> Option<&V> {
        match self {
            Self::Few(few) => few.binary_search_by(|(other, _)| (**other).cmp(name)).ok().map(|at| &few[at].1),
            Self::Many(many) => many.get(name),
        }
    }

    pub(super) fn get_mut(&mut self, name: &str) -> Option<&mut V> {
        match self {
            Self::Few(few) => few.binary_search_by(|(other, _)| (**other).cmp(name)).ok().map(|at| &mut few[at].1),
            Self::Many(many) => many.get_mut(name),
        }
    }

    pub(super) fn contains(&self, name: &str) -> bool {
        self.get(name).is_some()
    }

    /// Adds the entry, or replaces its value.
    pub(super) fn insert(&mut self, name: &str, value: V) {
        match self.get_mut(name) {
            Some(old) => *old = value,
            None => drop(self.or_insert_with(name, || value)),
        }
    }

    pub(super) fn remove(&mut self, name: &str) -> Option<V> {
        match self {
            Self::Few(few) => few.binary_search_by(|(other, _)| (**other).cmp(name)).ok().map(|at| few.remove(at).1),
            Self::Many(many) => many.remove(name),
        }
    }

    /// Returns the value of the entry. Inserts the result of `new` if the entry is missing.
    pub(super) fn or_insert_with(&mut self, name: &str, new: impl FnOnce() -> V) -> &mut V {
        if let Self::Few(few) = self
            && few.len() == FEW
            && few.binary_search_by(|(other, _)| (**other).cmp(name)).is_err()
        {
            *self = Self::Many(std::mem::take(few).into_iter().collect());
        }
        match self {
            Self::Few(few) => {
                let at = few.binary_search_by(|(other, _)| (**other).cmp(name)).unwrap_or_else(|at| {
                    few.reserve_exact(1);
                    few.insert(at, (name.into(), new()));
                    at
                });
                &mut few[at].1
            }
            Self::Many(many) => many.entry(name.into()).or_insert_with(new),
        }
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&str, &V)> {
        let (few, many) = match self {
            Self::Few(few) => (Some(few), None),
            Self::Many(many) => (None, Some(many)),
        };
        let few = few.into_iter().flatten().map(|(name, value)| (&**name, value));
        few.chain(many.into_iter().flatten().map(|(name, value)| (&**name, value)))
    }

    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = (&str, &mut V)> {
        let (few, many) = match self {
            Self::Few(few) => (Some(few), None),
            Self::Many(many) => (None, Some(many)),
        };
        let few = few.into_iter().flatten().map(|(name, value)| (&**name, value));
        few.chain(many.into_iter().flatten().map(|(name, value)| (&**name, value)))
    }

    pub(super) fn values(&self) -> impl Iterator<Item = &V> {
        self.iter().map(|(_, value)| value)
    }
}

/// Later values replace earlier ones of the same name.
impl<N: AsRef<str> + Into<Box<str>>, V> FromIterator<(N, V)> for Children<V> {
    fn from_iter<I: IntoIterator<Item = (N, V)>>(entries: I) -> Self {
        let many: BTreeMap<Box<str>, V> = entries.into_iter().map(|(name, value)| (name.into(), value)).collect();
        if many.len() > FEW { Self::Many(many) } else { Self::Few(many.into_iter().collect()) }
    }
}

impl<V: Serialize> Serialize for Children<V> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.iter())
    }
}

impl<'de, V: Deserialize<'de>> Deserialize<'de> for Children<V> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Vec::<(Box<str>, V)>::deserialize(deserializer).map(|entries| entries.into_iter().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn behaves_like_a_map(steps in prop::collection::vec((0_u8..60, 0_u8..4), 0..300)) {
            let (mut ours, mut map) = (Children::default(), BTreeMap::new());
            for (at, (name, what)) in steps.into_iter().enumerate() {
                let name = format!("n{name}");
                match what {
                    0 => prop_assert_eq!(ours.remove(&name), map.remove(&name)),
                    1 => {
                        let old = *map.entry(name.clone()).or_insert(at);
                        prop_assert_eq!(*ours.or_insert_with(&name, || at), old);
                    }
                    2 => if let Some(value) = ours.get_mut(&name) {
                        *value += 1;
                        map.entry(name.clone()).and_modify(|value| *value += 1);
                    },
                    _ => {
                        ours.insert(&name, at);
                        map.insert(name.clone(), at);
                    }
                }
                prop_assert_eq!(ours.get(&name), map.get(&name));
                prop_assert_eq!(ours.contains(&name), map.contains_key(&name));
            }
            prop_assert_eq!((ours.len(), ours.is_empty()), (map.len(), map.is_empty()));
            prop_assert!(ours.iter().eq(map.iter().map(|(name, value)| (name.as_str(), value))));
            let copy: Children<usize> = map.iter().map(|(name, value)| (name.as_str(), *value)).collect();
            prop_assert!(ours.iter_mut().map(|(name, value)| (name, *value)).eq(copy.iter().map(|(name, value)| (name, *value))));
        }
    }
}
