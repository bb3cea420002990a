import torch.nn.functional as F
def attention(q,k,v,*,kept_heads=None,key_padding_mask=None):
    m = None if key_padding_mask is None else key_padding_mask[:,None,None,:]
    return F.scaled_dot_product_attention(q,k,v,attn_mask=m, enable_gqa=k.shape[1]!=q.shape[1]), None
