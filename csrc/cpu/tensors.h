// Ops on torch's tensors in one call: arguments described, checked against the contract, run.
//
// A small weight's work is less than what Python does to check its arguments and to take their addresses. torch
// describes its tensors to C by DLPack's exchange API; no header of torch is used.
#pragma once

#include <pybind11/pybind11.h>

namespace feather {

// From here on the functions below take tensors of exactly these types; false where they do not offer the interface.
// get_num_threads() is asked where more than one thread would pay.
bool use_torch(const pybind11::type& tensor, const pybind11::type& parameter, const pybind11::object& get_num_threads);

// try_threshold(w, t, p, out) and try_scale_pruned_grad(g, w, t, grad_scale, out) -> whether the op was run. It is not,
// and nothing is written, for other devices, tensors with gaps or of different layouts, and arguments that do not fit:
// the caller's to look at.
// The caller answers for what cannot be seen here: that the memory of the tensors holds their values (that of a lazy
// zero does not exist), and that out is g, w or memory of its own.
extern PyMethodDef tensor_functions[];

}  // namespace feather
