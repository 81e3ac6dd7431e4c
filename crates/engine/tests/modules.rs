//! Which module of the engine knows which: imports point one way only. Read from the sources, tests left out: every path that
//! begins with `crate`, `super` or `self`, with a module beside it, or with a name that a `use` brought, is followed through
//! re-exports to the file that defines it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "tests")]

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::path::Path;

/// A path in the source, `crate::image::Image` as its words.
type Words = Vec<String>;

/// What a source file says of others.
#[derive(Default)]
struct Source {
    /// Its name below `src`.
    file: String,
    /// What each `use` brings, by the name that it has here.
    imports: BTreeMap<String, Words>,
    /// All paths, but for re-exports, which are no use of their own.
    paths: Vec<Words>,
}

/// All sources by the path of their module.
struct Sources(BTreeMap<Words, Source>);

#[test]
fn imports_between_modules_point_one_way() {
    let sources = Sources::read();
    let edges = sources.edges();
    assert!(edges.len() > 100, "{} imports were found", edges.len());
    let mut modules: BTreeMap<&str, BTreeMap<&str, BTreeSet<&str>>> = BTreeMap::new();
    for (from, to) in edges.iter().filter(|(from, to)| top(from) != top(to)) {
        modules.entry(top(from)).or_default().entry(top(to)).or_default().insert(from);
    }
    let circles = circles(&modules);
    assert!(circles.is_empty(), "modules that import each other:\n{circles}");
}

#[test]
fn imports_between_files_point_one_way() {
    let edges = Sources::read().edges();
    let mut files: BTreeMap<&str, BTreeMap<&str, BTreeSet<&str>>> = BTreeMap::new();
    for (from, to) in edges.iter().filter(|(from, to)| from != to) {
        files.entry(from).or_default().entry(to).or_default().insert(from);
    }
    let circles = circles(&files);
    assert!(circles.is_empty(), "files that import each other:\n{circles}");
}

#[test]
fn what_is_read_of_a_source() {
    let text = r##"
        use super::{a::B as C, d::{self, E}};
        pub use f::G;
        // use crate::comment::X;
        const S: &str = "use crate::string::X"; const R: &str = r#"crate::raw::X""#;
        fn h<'a>(x: &'a crate::i::J) -> char { d::k(); Self::l(x); '"' }
        #[cfg(test)]
        mod tests { use crate::test::X; }
    "##;
    let source = Source::parse("file.rs", text);
    let paths: BTreeSet<_> = source.paths.iter().map(|path| path.join("::")).collect();
    for expected in ["super::a::B", "super::d", "super::d::E", "crate::i::J", "d::k"] {
        assert!(paths.contains(expected), "{expected} in {paths:?}");
    }
    for other in ["f::G", "crate::comment::X", "crate::string::X", "crate::raw::X", "crate::test::X"] {
        assert!(!paths.contains(other), "{other} in {paths:?}");
    }
    assert_eq!(source.imports["C"].join("::"), "super::a::B");
    assert_eq!(source.imports["d"].join("::"), "super::d");
    assert_eq!(source.imports["G"].join("::"), "f::G");
}

#[test]
fn a_circle_is_named_with_its_files() {
    let mut graph: BTreeMap<&str, BTreeMap<&str, BTreeSet<&str>>> = BTreeMap::new();
    for (from, to, file) in [("a", "b", "a/x.rs"), ("b", "c", "b.rs"), ("c", "a", "c.rs"), ("c", "d", "c.rs")]
    {
        graph.entry(from).or_default().entry(to).or_default().insert(file);
    }
    assert_eq!(circles(&graph), "a -> b: a/x.rs\nb -> c: b.rs\nc -> a: c.rs\n");
}

/// The edges of which circles consist, a line each, with the files that make them.
fn circles(graph: &BTreeMap<&str, BTreeMap<&str, BTreeSet<&str>>>) -> String {
    let mut text = String::new();
    for (from, edges) in graph {
        for (to, files) in edges.iter().filter(|(to, _)| reaches(graph, to, from)) {
            let files: Vec<_> = files.iter().copied().collect();
            writeln!(text, "{from} -> {to}: {}", files.join(" ")).unwrap();
        }
    }
    text
}

fn reaches<T>(graph: &BTreeMap<&str, BTreeMap<&str, T>>, from: &str, to: &str) -> bool {
    let (mut seen, mut next) = (BTreeSet::from([from]), vec![from]);
    while let Some(at) = next.pop() {
        if at == to {
            return true;
        }
        next.extend(graph.get(at).into_iter().flat_map(BTreeMap::keys).filter(|to| seen.insert(to)));
    }
    false
}

/// The top-level module of a file.
fn top(file: &str) -> &str {
    file.split('/').next().unwrap().trim_end_matches(".rs")
}

impl Sources {
    fn read() -> Self {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
        let mut sources = BTreeMap::new();
        let mut folders = vec![root.clone()];
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    folders.push(path);
                    continue;
                }
                let file = path.strip_prefix(&root).unwrap().to_str().unwrap().replace('\\', "/");
                let mut module: Words = file.trim_end_matches(".rs").split('/').map(str::to_owned).collect();
                module.pop_if(|last| last == "mod" || last == "lib");
                if module.last().is_none_or(|last| !last.ends_with("_tests")) {
                    let text = std::fs::read_to_string(&path).unwrap();
                    sources.insert(module, Source::parse(&file, &text));
                }
            }
        }
        Self(sources)
    }

    /// Which file knows which.
    fn edges(&self) -> BTreeSet<(String, String)> {
        let mut edges = BTreeSet::new();
        for (module, source) in self.0.iter().filter(|(module, _)| !module.is_empty()) {
            let targets = source.paths.iter().filter_map(|path| self.resolve(module, path));
            edges.extend(targets.map(|to| (source.file.clone(), to.to_owned())));
        }
        edges
    }

    /// The file that defines what `path` names in `module`; none where that is a module, or outside.
    fn resolve(&self, module: &[String], path: &[String]) -> Option<&str> {
        let (mut at, mut rest) = (module.to_vec(), path);
        while let [first, tail @ ..] = rest {
            match first.as_str() {
                "crate" => at.clear(),
                "self" => {}
                "super" => drop(at.pop()),
                name => {
                    at.push(name.to_owned());
                    if !self.0.contains_key(&at) {
                        at.pop();
                        let here = &self.0[&at];
                        let begins = rest.len() == path.len();
                        return match here.imports.get(name) {
                            // `use a::a`: the first is another one.
                            Some(import) if begins && import == path => None,
                            Some(import) => self.resolve(&at, &[import, tail].concat()),
                            // A crate, a type of this file, a local name.
                            None if begins => None,
                            None => Some(&here.file),
                        };
                    }
                }
            }
            rest = tail;
        }
        None
    }
}

impl Source {
    fn parse(file: &str, text: &str) -> Self {
        let tokens = without_tests(tokens(text));
        let mut source = Self { file: file.to_owned(), ..Self::default() };
        let mut at = 0;
        while at < tokens.len() {
            let exported = tokens[..at].iter().rev().take(4).any(|token| token == "pub")
                && tokens[..at].last().is_some_and(|last| last == "pub" || last == ")");
            if tokens[at] == "use" {
                let end = at + tokens[at..].iter().position(|token| token == ";").unwrap();
                source.import(&tokens[at + 1..end], &[], exported);
                at = end;
            } else if is_word(&tokens[at]) && at.checked_sub(1).is_none_or(|before| tokens[before] != "::") {
                let mut path = vec![tokens[at].clone()];
                while tokens.get(at + 1).is_some_and(|token| token == "::")
                    && tokens.get(at + 2).is_some_and(|token| is_word(token))
                {
                    path.push(tokens[at + 2].clone());
                    at += 2;
                }
                if path.len() > 1 {
                    source.paths.push(path);
                }
            }
            at += 1;
        }
        source
    }

    /// Takes a tree of a `use` apart.
    fn import(&mut self, tree: &[String], before: &[String], exported: bool) {
        let mut path = before.to_vec();
        let mut at = 0;
        while let Some(token) = tree.get(at) {
            match token.as_str() {
                "{" => {
                    for part in split(&tree[at + 1..tree.len() - 1]) {
                        self.import(part, &path, exported);
                    }
                    return;
                }
                "::" => {}
                "as" => break,
                "self" if !path.is_empty() => {}
                word => path.push(word.to_owned()),
            }
            at += 1;
        }
        let name = if at < tree.len() { &tree[at + 1] } else { path.last().unwrap() };
        self.imports.insert(name.clone(), path.clone());
        if !exported {
            self.paths.push(path);
        }
    }
}

/// The parts of a list that commas separate.
fn split(list: &[String]) -> Vec<&[String]> {
    let (mut parts, mut depth, mut start) = (Vec::new(), 0, 0);
    for (at, token) in list.iter().enumerate() {
        match token.as_str() {
            "{" => depth += 1,
            "}" => depth -= 1,
            "," if depth == 0 => {
                parts.push(&list[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    parts.push(&list[start..]);
    parts.retain(|part| !part.is_empty());
    parts
}

fn is_word(token: &str) -> bool {
    token.starts_with(|first: char| first.is_alphabetic() || first == '_')
}

/// Leaves out what follows `#[cfg(test)]`: a module, here or in a file of its own.
fn without_tests(tokens: Vec<String>) -> Vec<String> {
    const MARK: [&str; 7] = ["#", "[", "cfg", "(", "test", ")", "]"];
    let mut kept = Vec::new();
    let mut at = 0;
    while at < tokens.len() {
        if !tokens[at..].iter().map(String::as_str).take(MARK.len()).eq(MARK) {
            kept.push(tokens[at].clone());
            at += 1;
            continue;
        }
        let mut depth = 0;
        loop {
            at += 1;
            match tokens[at].as_str() {
                "{" => depth += 1,
                "}" => depth -= 1,
                _ => {}
            }
            if depth == 0 && matches!(tokens[at].as_str(), "}" | ";") {
                break;
            }
        }
        at += 1;
    }
    kept
}

/// Words, `::` and single signs; comments and literals are left out.
fn tokens(text: &str) -> Vec<String> {
    let mut tokens = Vec::new();
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let length = if rest.starts_with("//") {
            rest.find('\n').unwrap_or(rest.len())
        } else if rest.starts_with("/*") {
            rest.find("*/").unwrap() + 2
        } else if let Some(hashes) = raw_string(rest) {
            let close = format!("\"{}", "#".repeat(hashes));
            let open = rest.find('"').unwrap() + 1;
            open + rest[open..].find(&close).unwrap() + close.len()
        } else if first == '"' {
            quoted(rest, '"')
        } else if first == '\'' {
            // A lifetime has no end.
            let is_char = rest[1..].starts_with('\\') || rest.chars().nth(2) == Some('\'');
            if is_char { quoted(rest, '\'') } else { 1 }
        } else if first.is_alphanumeric() || first == '_' {
            let end = rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(rest.len());
            tokens.push(rest[..end].to_owned());
            end
        } else if rest.starts_with("::") {
            tokens.push("::".to_owned());
            2
        } else {
            if !first.is_whitespace() {
                tokens.push(first.to_string());
            }
            first.len_utf8()
        };
        rest = &rest[length..];
    }
    tokens
}

/// The number of signs around a raw string that begins here.
fn raw_string(text: &str) -> Option<usize> {
    let behind = text.strip_prefix("br").or_else(|| text.strip_prefix('r'))?;
    let hashes = behind.len() - behind.trim_start_matches('#').len();
    behind[hashes..].starts_with('"').then_some(hashes)
}

/// The length of a literal that ends with `quote`.
fn quoted(text: &str, quote: char) -> usize {
    let mut escaped = false;
    for (at, c) in text.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            c if c == quote => return at + 1,
            _ => {}
        }
    }
    text.len()
}
