//! Rust source text, as far as the layering tests need it: code without comments, literals and
//! tests, and the paths that it names, made absolute. No parser: a few tokens and brackets.

/// A piece of code.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Token {
    Word(String),
    /// `::`
    Colons,
    Sign(char),
}

/// A path from the root of a crate, and whether the code named its own crate or another one.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Path {
    /// `crate`, or the name of another crate.
    pub root: String,
    pub parts: Vec<String>,
}

impl std::fmt::Display for Path {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}::{}", self.root, self.parts.join("::"))
    }
}

/// `text` without comments; string and character literals are empty.
fn strip(text: &str) -> String {
    let chars: Vec<char> = text.chars().collect();
    let at = |i: usize| chars.get(i).copied().unwrap_or('\0');
    let (mut code, mut i) = (String::new(), 0);
    while i < chars.len() {
        let c = chars[i];
        let in_word = i > 0 && (at(i - 1).is_alphanumeric() || at(i - 1) == '_');
        if c == '/' && at(i + 1) == '/' {
            while i < chars.len() && at(i) != '\n' {
                i += 1;
            }
        } else if c == '/' && at(i + 1) == '*' {
            let mut depth = 0;
            loop {
                match (at(i), at(i + 1)) {
                    ('/', '*') => (depth, i) = (depth + 1, i + 2),
                    ('*', '/') => (depth, i) = (depth - 1, i + 2),
                    _ => i += 1,
                }
                if depth == 0 || i >= chars.len() {
                    break;
                }
            }
            code.push(' ');
        } else if let Some((start, hashes)) = raw_string(&chars, i).filter(|_| !in_word) {
            let end: Vec<char> = std::iter::once('"').chain(vec!['#'; hashes]).collect();
            i = start;
            while i < chars.len() && !chars[i..].starts_with(&end) {
                i += 1;
            }
            i += end.len();
            code.push_str("\"\"");
        } else if c == '"' {
            i += 1;
            while i < chars.len() && at(i) != '"' {
                i += if at(i) == '\\' { 2 } else { 1 };
            }
            i += 1;
            code.push_str("\"\"");
        } else if c == '\'' && (at(i + 1) == '\\' || at(i + 2) == '\'') {
            // A character, not a lifetime.
            i += if at(i + 1) == '\\' { 3 } else { 2 };
            while i < chars.len() && at(i) != '\'' {
                i += 1;
            }
            i += 1;
            code.push_str("''");
        } else {
            code.push(c);
            i += 1;
        }
    }
    code
}

/// Where the content of a raw string begins whose start is at `i`, and its number of `#`.
fn raw_string(chars: &[char], i: usize) -> Option<(usize, usize)> {
    let mut at = i;
    if chars.get(at) == Some(&'b') || chars.get(at) == Some(&'c') {
        at += 1;
    }
    if chars.get(at) != Some(&'r') {
        return None;
    }
    at += 1;
    let hashes = chars[at..].iter().take_while(|c| **c == '#').count();
    (chars.get(at + hashes) == Some(&'"')).then_some((at + hashes + 1, hashes))
}

fn tokens(code: &str) -> Vec<Token> {
    let mut tokens = Vec::new();
    let mut chars = code.chars().peekable();
    while let Some(c) = chars.next() {
        if c.is_alphanumeric() || c == '_' {
            let mut word = c.to_string();
            while let Some(c) = chars.next_if(|c| c.is_alphanumeric() || *c == '_') {
                word.push(c);
            }
            tokens.push(Token::Word(word));
        } else if c == ':' && chars.next_if_eq(&':').is_some() {
            tokens.push(Token::Colons);
        } else if !c.is_whitespace() {
            tokens.push(Token::Sign(c));
        }
    }
    tokens
}

/// What of a file is compiled without `cfg(test)` and `cfg(fuzzing)`.
pub struct Source {
    tokens: Vec<Token>,
    /// Modules in files of their own that are there for tests only.
    pub test_modules: Vec<String>,
}

impl Source {
    pub fn new(text: &str) -> Self {
        let all = tokens(&strip(text));
        let (mut kept, mut test_modules, mut i) = (Vec::new(), Vec::new(), 0);
        // What is compiled for tests and for fuzzing only, is not part of the program either.
        let markers = ["#[cfg(test)]", "#[cfg(any(test, fuzzing))]"].map(tokens);
        while i < all.len() {
            if let Some(marker) = markers.iter().find(|it| all[i..].starts_with(it)) {
                let start = i + marker.len();
                i = end_of_item(&all, start);
                let words: Vec<&Token> = all[start..i].iter().collect();
                if let [.., Token::Word(is_mod), Token::Word(name), Token::Sign(';')] = words[..]
                    && is_mod == "mod"
                {
                    test_modules.push(name.clone());
                }
            } else {
                kept.push(all[i].clone());
                i += 1;
            }
        }
        Source {
            tokens: kept,
            test_modules,
        }
    }

    /// How many unsafe blocks, functions, implementations, traits and blocks of foreign items.
    pub fn unsafe_items(&self) -> usize {
        let word = |token: &Token, words: &[&str]| match token {
            Token::Word(word) => words.contains(&word.as_str()),
            _ => false,
        };
        let is_unsafe = |at: &&[Token]| {
            word(&at[0], &["unsafe"])
                && (at[1] == Token::Sign('{')
                    || word(&at[1], &["impl", "extern", "trait"])
                    // Not the type of a pointer to a function.
                    || word(&at[1], &["fn"]) && matches!(at[2], Token::Word(_)))
        };
        self.tokens.windows(3).filter(is_unsafe).count()
    }

    /// All paths that begin with `crate`, `self`, `super` or one of `crates`, from the crate's
    /// root on. `module` is where the text stands.
    pub fn paths(&self, module: &[String], crates: &[&str]) -> Vec<Path> {
        let mut found = Vec::new();
        // Modules that are written out in the file, and how deep in braces each one is.
        let (mut inside, mut depth) = (Vec::<(String, usize)>::new(), 0);
        for (i, token) in self.tokens.iter().enumerate() {
            match token {
                Token::Sign('{') => depth += 1,
                Token::Sign('}') => {
                    depth -= 1;
                    inside.retain(|(_, at)| *at <= depth);
                }
                Token::Word(word) if word == "mod" => {
                    if let [Token::Word(name), Token::Sign('{'), ..] = &self.tokens[i + 1..] {
                        inside.push((name.clone(), depth + 1));
                    }
                }
                Token::Word(word) => {
                    let begins = i == 0 || self.tokens[i - 1] != Token::Colons;
                    let relative = ["crate", "self", "super"].contains(&word.as_str());
                    let goes_on = self.tokens.get(i + 1) == Some(&Token::Colons);
                    let is_renamed = word == "crate"
                        && self.tokens.get(i + 1) == Some(&Token::Word("as".into()));
                    if begins && (relative || crates.contains(&word.as_str())) && goes_on {
                        let mut here = module.to_vec();
                        here.extend(inside.iter().map(|(name, _)| name.clone()));
                        let mut tails = Vec::new();
                        tree(&self.tokens, &mut (i + 2), &mut Vec::new(), &mut tails);
                        found.extend(tails.into_iter().map(|tail| absolute(word, &here, tail)));
                    } else if begins && is_renamed {
                        found.push(absolute(word, &[], vec!["*".into()]));
                    }
                }
                _ => {}
            }
        }
        found
    }
}

/// Where the item ends that begins at `start`: behind its `;`, its braces or, for fields, variants
/// and arms, its comma.
fn end_of_item(tokens: &[Token], start: usize) -> usize {
    const ITEMS: [&str; 14] = [
        "pub",
        "fn",
        "mod",
        "impl",
        "use",
        "struct",
        "enum",
        "const",
        "static",
        "trait",
        "type",
        "unsafe",
        "let",
        "macro_rules",
    ];
    let (mut depth, mut i) = (0, start);
    // Further attributes belong to it.
    while tokens.get(i) == Some(&Token::Sign('#')) {
        i += 1;
        loop {
            match tokens.get(i) {
                Some(Token::Sign('[')) => depth += 1,
                Some(Token::Sign(']')) => depth -= 1,
                None => return i,
                _ => {}
            }
            i += 1;
            if depth == 0 {
                break;
            }
        }
    }
    let word = |token: &Token| match token {
        Token::Word(word) => word.clone(),
        _ => String::new(),
    };
    let is_item = tokens
        .get(i)
        .is_some_and(|t| ITEMS.contains(&word(t).as_str()));
    let ends_with_sign = tokens[i..]
        .iter()
        .take(5)
        .any(|token| ["use", "let", "static", "type"].contains(&word(token).as_str()))
        || tokens.get(i).map(word).as_deref() == Some("const")
            && tokens.get(i + 2) == Some(&Token::Sign(':'));
    while let Some(token) = tokens.get(i) {
        i += 1;
        match token {
            Token::Sign('{' | '(' | '[') => depth += 1,
            Token::Sign('}' | ')' | ']') if depth == 0 => return i - 1,
            Token::Sign('}') => {
                depth -= 1;
                if depth == 0 && is_item && !ends_with_sign {
                    return i;
                }
            }
            Token::Sign(')' | ']') => depth -= 1,
            Token::Sign(';') if depth == 0 => return i,
            Token::Sign(',') if depth == 0 && !is_item => return i,
            _ => {}
        }
    }
    i
}

/// The paths of a use-tree, or of an expression, from token `at` on.
fn tree(tokens: &[Token], at: &mut usize, before: &mut Vec<String>, found: &mut Vec<Vec<String>>) {
    let length = before.len();
    loop {
        match tokens.get(*at) {
            Some(Token::Word(word)) => {
                before.push(word.clone());
                *at += 1;
                if tokens.get(*at) == Some(&Token::Colons) {
                    *at += 1;
                    continue;
                }
                found.push(before.clone());
            }
            Some(Token::Sign('*')) => {
                *at += 1;
                before.push("*".into());
                found.push(before.clone());
            }
            Some(Token::Sign('{')) => {
                *at += 1;
                while !matches!(tokens.get(*at), None | Some(Token::Sign('}'))) {
                    let mut inner = before.clone();
                    tree(tokens, at, &mut inner, found);
                    // A new name, and the comma.
                    while !matches!(
                        tokens.get(*at),
                        None | Some(Token::Sign(',') | Token::Sign('}'))
                    ) {
                        *at += 1;
                    }
                    if tokens.get(*at) == Some(&Token::Sign(',')) {
                        *at += 1;
                    }
                }
                *at += 1;
            }
            // `<` of a generic argument, or the end.
            _ => found.push(before.clone()),
        }
        break;
    }
    before.truncate(length);
}

/// `first::tail`, written in module `here`, from the root on.
fn absolute(first: &str, here: &[String], tail: Vec<String>) -> Path {
    let (root, mut parts) = match first {
        "crate" => ("crate", Vec::new()),
        "self" => ("crate", here.to_vec()),
        "super" => ("crate", here[..here.len().saturating_sub(1)].to_vec()),
        other => (other, Vec::new()),
    };
    for part in tail {
        match part.as_str() {
            "super" => drop(parts.pop()),
            "self" => {}
            _ => parts.push(part),
        }
    }
    Path {
        root: root.into(),
        parts,
    }
}
