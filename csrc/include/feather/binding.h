// Shared by the bindings of both modules: arguments that are addresses and dtype codes, and build_info.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>
#include <vector>

#include "feather/dtype.h"

namespace feather {

// An address, an int in Python, that converts to a pointer to any type. 0 (the default) is nullptr.
struct Address {
  uintptr_t value;

  explicit Address(uintptr_t number = 0) : value(number) {}

  template <class T>
  operator T*() const {
    return reinterpret_cast<T*>(value);
  }
};

// One tuple (address, number of elements or entries, dtype) for each array.
using ArrayTuples = std::vector<std::tuple<Address, int64_t, DType>>;

// What build_info() of a module returns: the version, the hash of the sources, the compiler, and one fact of its own.
inline pybind11::dict build_info(const char* own_name, const char* own_fact) {
  pybind11::dict info;
  info["version"] = FEATHER_VERSION;
  info["source_hash"] = FEATHER_SOURCE_HASH;
  info["compiler"] = FEATHER_COMPILER;
  info[own_name] = own_fact;
  return info;
}

}  // namespace feather

namespace pybind11::detail {

// Converts a Python int to a T by way of a Number, and never back.
template <class T, class Number>
struct number_caster {
  PYBIND11_TYPE_CASTER(T, const_name("int"));

  bool load(handle source, bool convert) {
    make_caster<Number> number;
    if (!number.load(source, convert)) return false;
    value = static_cast<T>(cast_op<Number>(number));
    return true;
  }
};

template <>
struct type_caster<feather::Address> : number_caster<feather::Address, uintptr_t> {};
template <>
struct type_caster<feather::DType> : number_caster<feather::DType, int> {};

}  // namespace pybind11::detail
