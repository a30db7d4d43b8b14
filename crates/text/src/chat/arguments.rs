//! Arguments of a call as Python takes them: by position or by name.

use minijinja::value::{Kwargs, Value, from_args};
use minijinja::{Error, ErrorKind};

/// The arguments of a call by the names of its parameters; `None` where one was left out.
pub(super) fn bind<const N: usize>(args: &[Value], names: [&str; N]) -> Result<[Option<Value>; N], Error> {
    let (positional, named) = match args.split_last() {
        Some((last, rest)) if last.is_kwargs() => {
            (rest, Some(from_args::<(Kwargs,)>(&args[rest.len()..])?.0))
        }
        _ => (args, None),
    };
    if positional.len() > N {
        let problem = format!("takes {N} arguments at most, not {}", positional.len());
        return Err(Error::new(ErrorKind::TooManyArguments, problem));
    }
    let mut bound = [const { None }; N];
    for (slot, value) in bound.iter_mut().zip(positional) {
        *slot = Some(value.clone());
    }
    if let Some(named) = named {
        for (slot, name) in bound.iter_mut().zip(names) {
            if named.has(name) {
                *slot = Some(named.get(name)?);
            }
        }
        named.assert_all_used()?;
    }
    Ok(bound)
}

/// What may be done with an argument.
pub(super) trait Argument {
    /// Whether it is there, and not `none`.
    fn given(&self) -> Option<&Value>;

    /// As text.
    fn text(&self) -> Result<Option<&str>, Error> {
        let wrong = |value: &Value| wrong(format!("expected a string, not {}", value.kind()));
        self.given().map(|value| value.as_str().ok_or_else(|| wrong(value))).transpose()
    }

    /// As a whole number.
    fn integer(&self) -> Result<Option<i64>, Error> {
        self.given().map(|value| i64::try_from(value.clone())).transpose()
    }

    /// As a length, where a negative number is none.
    fn length(&self) -> Result<Option<usize>, Error> {
        Ok(self.integer()?.map(|number| usize::try_from(number).unwrap_or(0)))
    }

    /// Whether it is true.
    fn flag(&self) -> bool {
        self.given().is_some_and(Value::is_true)
    }
}

impl Argument for Option<Value> {
    fn given(&self) -> Option<&Value> {
        self.as_ref().filter(|value| !value.is_none() && !value.is_undefined())
    }
}

/// An argument that must be there.
pub(super) fn required<'a>(argument: &'a Option<Value>, name: &str) -> Result<&'a Value, Error> {
    argument
        .as_ref()
        .ok_or_else(|| Error::new(ErrorKind::MissingArgument, format!("the argument `{name}` is missing")))
}

/// An argument that must be text.
pub(super) fn required_text<'a>(argument: &'a Option<Value>, name: &str) -> Result<&'a str, Error> {
    required(argument, name)?;
    argument.text()?.ok_or_else(|| wrong(format!("`{name}` must be a string")))
}

/// An error about a wrong value.
pub(super) fn wrong(problem: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, problem.into())
}
