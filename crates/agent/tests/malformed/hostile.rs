//! Every field of a message, one at a time, with every hostile value of its type.

use bulkhead_protocol::protobuf::{
    MessageDyn,
    reflect::{FieldDescriptor, ReflectValueBox, RuntimeFieldType, RuntimeType},
};

/// A configuration is not nested deeper.
const DEPTH: usize = 6;
/// So many elements are many.
const MANY: usize = 10_000;

/// The values to plant.
pub(crate) struct Values {
    /// For strings.
    pub(crate) strings: Vec<String>,
    /// For numbers, cut to their type.
    pub(crate) numbers: Vec<i64>,
    /// Lists get [`MANY`] elements, too.
    pub(crate) many: bool,
}

/// Calls `use_it` with the path of a field and the message with a hostile value in it, for each field and value.
pub(crate) fn each(
    message: &dyn MessageDyn,
    values: &Values,
    use_it: &mut dyn FnMut(String, Box<dyn MessageDyn>),
) {
    below(message, values, DEPTH, use_it);
}

fn below(
    message: &dyn MessageDyn,
    values: &Values,
    depth: usize,
    use_it: &mut dyn FnMut(String, Box<dyn MessageDyn>),
) {
    if depth == 0 {
        return;
    }
    for field in message.descriptor_dyn().fields() {
        let name = field.name().to_owned();
        let mut plant = |path: String, put: &dyn Fn(&mut dyn MessageDyn)| {
            let mut hostile = message.clone_box();
            put(&mut *hostile);
            use_it(format!("{name}{path}"), hostile);
        };
        match field.runtime_field_type() {
            RuntimeFieldType::Singular(kind) => {
                let present = present(message, &field, &kind);
                each_value(present, &kind, values, depth, &mut |path, value| {
                    plant(path, &|hostile| field.set_singular_field(hostile, value.clone()));
                });
            }
            RuntimeFieldType::Repeated(kind) => {
                let first = field.get_repeated(message).into_iter().next().map(|value| value.to_box());
                let first = first.or_else(|| blank(&kind));
                each_value(first.clone(), &kind, values, depth, &mut |path, value| {
                    plant(path, &|hostile| {
                        let mut list = field.mut_repeated(hostile);
                        list.clear();
                        list.push(value.clone());
                    });
                });
                if values.many
                    && let Some(first) = first
                {
                    plant("[many]".to_owned(), &|hostile| {
                        let mut list = field.mut_repeated(hostile);
                        (0..MANY).for_each(|_| list.push(first.clone()));
                    });
                }
            }
            RuntimeFieldType::Map(key, value) => {
                for text in &values.strings {
                    plant("[key]".to_owned(), &|hostile| {
                        let (Some(value), RuntimeType::String) = (blank(&value), &key) else { return };
                        field.mut_map(hostile).insert(ReflectValueBox::String(text.clone()), value);
                    });
                }
                each_value(blank(&value), &value, values, depth, &mut |path, value| {
                    plant(format!("[k]{path}"), &|hostile| {
                        if let RuntimeType::String = key {
                            field.mut_map(hostile).insert(ReflectValueBox::String("k".into()), value.clone());
                        }
                    });
                });
            }
        }
    }
}

fn present(message: &dyn MessageDyn, field: &FieldDescriptor, kind: &RuntimeType) -> Option<ReflectValueBox> {
    field.get_singular(message).map(|value| value.to_box()).or_else(|| blank(kind))
}

/// What a field of this type is when nobody sets it.
fn blank(kind: &RuntimeType) -> Option<ReflectValueBox> {
    Some(match kind {
        RuntimeType::String => ReflectValueBox::String(String::new()),
        RuntimeType::VecU8 => ReflectValueBox::Bytes(Vec::new()),
        RuntimeType::Message(message) => ReflectValueBox::Message(message.new_instance()),
        RuntimeType::I32 => ReflectValueBox::I32(0),
        RuntimeType::I64 => ReflectValueBox::I64(0),
        RuntimeType::U32 => ReflectValueBox::U32(0),
        RuntimeType::U64 => ReflectValueBox::U64(0),
        RuntimeType::Bool => ReflectValueBox::Bool(false),
        _ => return None,
    })
}

#[allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a number that does not fit is cut"
)]
fn each_value(
    present: Option<ReflectValueBox>,
    kind: &RuntimeType,
    values: &Values,
    depth: usize,
    use_it: &mut dyn FnMut(String, ReflectValueBox),
) {
    let mut numbers = |of: &dyn Fn(i64) -> ReflectValueBox| {
        values.numbers.iter().for_each(|number| use_it(format!("={number}"), of(*number)));
    };
    match kind {
        RuntimeType::I32 => numbers(&|number| ReflectValueBox::I32(number as i32)),
        RuntimeType::I64 => numbers(&ReflectValueBox::I64),
        RuntimeType::U32 => numbers(&|number| ReflectValueBox::U32(number as u32)),
        RuntimeType::U64 => numbers(&|number| ReflectValueBox::U64(number as u64)),
        RuntimeType::Enum(kind) => {
            numbers(&|number| ReflectValueBox::Enum(kind.clone(), number as i32));
        }
        RuntimeType::Bool => use_it("=true".into(), ReflectValueBox::Bool(true)),
        RuntimeType::F32 | RuntimeType::F64 => {}
        RuntimeType::String => {
            for text in &values.strings {
                use_it(
                    format!("={:?}", text.chars().take(40).collect::<String>()),
                    ReflectValueBox::String(text.clone()),
                );
            }
        }
        RuntimeType::VecU8 => {
            for text in &values.strings {
                use_it(
                    format!("={:?}", text.chars().take(40).collect::<String>()),
                    ReflectValueBox::Bytes(text.clone().into_bytes()),
                );
            }
        }
        RuntimeType::Message(_) => {
            if let Some(ReflectValueBox::Message(message)) = present {
                use_it(String::new(), ReflectValueBox::Message(message.clone()));
                below(&*message, values, depth - 1, &mut |path, message| {
                    use_it(format!(".{path}"), ReflectValueBox::Message(message));
                });
            }
        }
    }
}
