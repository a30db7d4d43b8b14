//! JSON schemas of the calls of functions that an answer must make.

use crate::openai::tools::Tool;
use serde_json::{Value, json};

/// The arguments of one of the functions.
pub(crate) fn arguments_of(tools: &[Tool], name: &str) -> Value {
    let tool = tools.iter().find(|tool| tool.function.name == name);
    tool.map_or_else(any_object, parameters)
}

/// A list of calls of any of the functions: at least one, and no more unless there may be `several`.
pub(crate) fn list_of_calls(tools: &[Tool], several: bool) -> Value {
    let call = |(number, tool): (usize, &Tool)| {
        let arguments = json!({ "$ref": place_of(number) });
        json!({
            "type": "object",
            "properties": { "name": { "const": tool.function.name }, "arguments": arguments },
            "required": ["name", "arguments"],
            "additionalProperties": false,
        })
    };
    let calls: Vec<Value> = tools.iter().enumerate().map(call).collect();
    let definitions = tools.iter().enumerate().map(|(number, tool)| {
        let mut schema = parameters(tool);
        move_references(&mut schema, &place_of(number));
        (number.to_string(), schema)
    });
    let mut list = json!({ "type": "array", "items": { "anyOf": calls }, "minItems": 1 });
    list["$defs"] = definitions.collect();
    if !several {
        list["maxItems"] = 1.into();
    }
    list
}

fn place_of(number: usize) -> String {
    format!("#/$defs/{number}")
}

/// A schema that stood alone now stands at `place`, and so does what it refers to.
fn move_references(schema: &mut Value, place: &str) {
    match schema {
        Value::Object(object) => {
            if let Some(Value::String(reference)) = object.get_mut("$ref")
                && let Some(path) = reference.strip_prefix('#')
            {
                *reference = format!("{place}{path}");
            }
            object.values_mut().for_each(|value| move_references(value, place));
        }
        Value::Array(list) => list.iter_mut().for_each(|value| move_references(value, place)),
        _ => {}
    }
}

/// The schema of a function's arguments.
fn parameters(tool: &Tool) -> Value {
    let given = tool.function.parameters.clone().filter(|schema| !schema.is_empty());
    given.map_or_else(any_object, Value::Object)
}

fn any_object() -> Value {
    json!({ "type": "object" })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tool(name: &str, parameters: Value) -> Tool {
        let function = json!({ "name": name, "parameters": parameters });
        serde_json::from_value(json!({ "type": "function", "function": function })).unwrap()
    }

    #[test]
    fn references_follow_their_schema() {
        let list = json!({ "properties": { "next": { "$ref": "#" }, "x": { "$ref": "#/$defs/x" } }, "$defs": { "x": {} } });
        let calls = list_of_calls(&[tool("f", json!({})), tool("g", list)], false);
        assert_eq!(calls["$defs"]["0"], any_object());
        assert_eq!(calls["$defs"]["1"]["properties"]["next"]["$ref"], "#/$defs/1");
        assert_eq!(calls["$defs"]["1"]["properties"]["x"]["$ref"], "#/$defs/1/$defs/x");
        assert_eq!((&calls["minItems"], &calls["maxItems"]), (&json!(1), &json!(1)));
        assert_eq!(calls["items"]["anyOf"][1]["properties"]["name"]["const"], "g");
    }

    #[test]
    fn functions_without_parameters_take_any_object() {
        let tools = [tool("f", Value::Null), tool("g", json!({ "type": "object", "properties": {} }))];
        assert_eq!(arguments_of(&tools, "f"), any_object());
        assert_eq!(arguments_of(&tools, "g"), json!({ "type": "object", "properties": {} }));
    }
}
