// Outputs that no cache holds are written another way, a line at a time: rows that begin anywhere in a line, and what
// lies between and around them.
import test from 'ava'
import { type PyRef, postReorder, preReorder } from 'epmoe'
import { testDevices } from './helpers/devices.js'
import { python } from './helpers/python.js'

const reference = python.exec(`
import torch

def arguments(dtype, tokens, topk, hidden, device):
    torch.manual_seed(hidden)
    rows = tokens * topk + 3
    order = torch.randperm(rows)[: tokens * topk].to(torch.int32).view(tokens, topk)
    order[torch.rand(tokens, topk) < 0.1] = -1
    # A byte of the allocation's own before the first row: nothing begins at a line.
    memory = torch.full((rows * hidden + 1,), 7.0, dtype=dtype)
    made = {
        "input": torch.randn(tokens, hidden).to(dtype),
        "moved": memory[1:].view(rows, hidden),
        "order": order,
        "weights": torch.rand(tokens, topk),
        "sums": torch.full((tokens * hidden + 1,), 7.0, dtype=dtype)[1:].view(tokens, hidden),
    }
    return {name: value.to(device) for name, value in made.items()}

def moved_as_expected(made):
    expected = torch.full_like(made["moved"], 7.0)
    order = made["order"].long()
    here = order >= 0
    expected[order[here]] = made["input"].repeat_interleave(order.shape[1], 0)[here.flatten()]
    return torch.equal(made["moved"], expected)
`)

for (const device of testDevices) {
  for (const [dtype, hidden] of [
    ['bfloat16', 3585],
    ['float32', 2049],
    ['bfloat16', 3584],
  ] as const) {
    test(`rows of ${hidden} in ${dtype}, more than a cache holds, on ${device}`, (t) => {
      const [tokens, topk] = [1030, 8]
      const torch = python.import('torch')
      const made = reference.method('arguments', torch.get(dtype), tokens, topk, hidden, device)
      const [input, moved, order, weights, sums] = ['input', 'moved', 'order', 'weights', 'sums'].map((name) =>
        made.item(name),
      ) as [PyRef, PyRef, PyRef, PyRef, PyRef]
      preReorder({ input, gateupInput: moved, src2dst: order })
      t.true(reference.method('moved_as_expected', made).toJS())
      const last = moved.method('view', -1).item(-1)
      const value = last.method('clone')
      last.method('add_', 1)
      t.false(reference.method('moved_as_expected', made).toJS(), 'a control')
      last.method('copy_', value)

      postReorder({ downOutput: moved, output: sums, src2dst: order, topkWeights: weights })
      // The same tokens by tens: nothing that a cache does not hold.
      for (let first = 0; first < tokens; first += 103) {
        const part = (ref: PyRef) => ref.method('narrow', 0, first, 103)
        const output = part(sums).method('clone').method('fill_', 5)
        postReorder({ downOutput: moved, output, src2dst: part(order), topkWeights: part(weights) })
        t.true(torch.method('equal', output, part(sums)).toJS())
        t.false(torch.method('equal', output.method('mul_', 1.01), part(sums)).toJS(), 'a control')
      }
    })
  }
}
