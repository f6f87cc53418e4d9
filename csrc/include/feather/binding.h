// What the bindings of both modules share: arguments that are addresses and dtype codes, and facts on the build.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>
#include <vector>

#include "feather/dtype.h"

namespace feather {

// A pointer to any type, an int in Python.
struct Address {
  uintptr_t value;

  explicit Address(uintptr_t number = 0) : value(number) {}

  template <class T>
  operator T*() const {
    return reinterpret_cast<T*>(value);
  }
};

// (address, number of elements or entries, dtype) of each.
using Tables = std::vector<std::tuple<Address, int64_t, DType>>;

inline pybind11::dict build_info(const char* last_name, const char* last) {
  pybind11::dict info;
  info["version"] = FEATHER_VERSION;
  info["source_hash"] = FEATHER_SOURCE_HASH;
  info["compiler"] = FEATHER_COMPILER;
  info[last_name] = last;
  return info;
}

}  // namespace feather

namespace pybind11::detail {

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
